"""The manifests in ``k8s/``: rendered and checked without a cluster (docs/kubernetes.md)."""
