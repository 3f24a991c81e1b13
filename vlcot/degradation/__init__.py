"""Real-ESRGAN degradation with every drawn parameter recorded, and its description in words.

``degrade`` makes an LR image and a :class:`DegradationRecord`; ``apply_record`` makes the same LR image again;
``describe`` puts the record into the words of the ``<degradation>`` block. See docs/degradation.md.
"""

from vlcot.degradation.config import SEESR_LIGHT, SEESR_TRAINING, DegradationConfig, StageConfig
from vlcot.degradation.pipeline import apply_record, degrade, make_target, sample_record
from vlcot.degradation.record import DegradationRecord
from vlcot.degradation.text import COMPONENT_COUNT, components, describe, fraction_correct, vocabulary

__all__ = [
    "COMPONENT_COUNT",
    "SEESR_LIGHT",
    "SEESR_TRAINING",
    "DegradationConfig",
    "DegradationRecord",
    "StageConfig",
    "apply_record",
    "components",
    "degrade",
    "describe",
    "fraction_correct",
    "make_target",
    "sample_record",
    "vocabulary",
]
