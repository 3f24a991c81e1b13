"use strict";

const CALLS = "api/restorations";
const $ = (id) => document.getElementById(id);
const SMALL = 320; // a result narrower than this is shown larger, with its pixels as they are
const STEPS = [
  { name: "Degradation", text: "degradation" },
  { name: "Coarse", text: "rough_understand", image: "rough_image" },
  { name: "Middle", text: "middle_understand", image: "middle_image" },
  { name: "Final", text: "final_understand", image: "final_image" },
];
let photograph = null;
let begun = null; // what the server said of the restoration that is shown
let box = null; // where the tile that is being drawn lies on the photograph
let running = null; // aborts the one under way

/** Sends the photograph and shows what the server tells, line by line, until it ends. */
async function restore() {
  running?.abort();
  const mine = (running = new AbortController());
  clear();
  $("again").disabled = $("stop").disabled = false;
  $("status").textContent = "Sending";
  try {
    const answer = await fetch(`${CALLS}?seed=${encodeURIComponent($("seed").value)}`, {
      method: "POST",
      headers: { "content-type": "application/octet-stream" },
      body: photograph,
      signal: mine.signal,
    });
    if (!answer.ok) throw new Error(`Not restored: ${(await answer.json()).error.message}.`);
    let ended = false;
    for await (const event of events(answer.body)) {
      SHOW[event.type](event);
      ended = event.type === "done" || event.type === "failed";
    }
    if (!ended) throw new Error("The server stopped in the middle.");
  } catch (error) {
    if (running !== mine) return; // another has begun meanwhile
    console.warn(error);
    $("status").textContent = "";
    if (mine.signal.aborted) $("status").textContent = "Stopped";
    else $("message").textContent = error instanceof TypeError ? "The server does not answer." : error.message;
  }
  if (running === mine) {
    running = null;
    $("stop").disabled = true;
  }
}

/** The JSON objects of a stream of lines. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

function clear() {
  $("message").textContent = "";
  $("result").hidden = true;
  $("work").hidden = true;
  $("steps").replaceChildren();
  $("drawn").replaceChildren();
  begun = null;
}

const sized = (size) => `${size[0]}×${size[1]}`;

const SHOW = {
  waiting(event) {
    $("status").textContent = `Waiting: ${event.before} before this one`;
  },

  begun(event) {
    begun = event;
    const shrunk = sized(event.given) !== sized(event.used);
    $("sizes").textContent =
      `${sized(event.given)} pixels${shrunk ? `, shrunk to ${sized(event.used)} first` : ""}; ` +
      `result ${sized(event.result)}${["", ...event.notes].join("; ")}`;
    $("work").hidden = false;
  },

  tile(event) {
    const [left, top, width, height] = event.box.map((part) => `${100 * part}%`);
    Object.assign($("tile").style, { left, top, width, height });
    box = { left, top, width, height };
    $("tile").hidden = begun.tiles === 1;
    $("status").textContent = begun.tiles === 1 ? "Restoring" : `Restoring: tile ${event.tile} of ${begun.tiles}`;
    $("steps").replaceChildren(...STEPS.map(card).filter(Boolean));
  },

  chain(event) {
    for (const [tag, text] of Object.entries(event.texts)) {
      const place = document.querySelector(`[data-text="${tag}"]`);
      if (place.textContent !== text) place.textContent = text;
      opened(place.closest(".step"));
    }
    const bar = event.drawing && document.querySelector(".picture progress");
    if (bar) {
      [bar.value, bar.max] = event.drawing;
      opened(bar.closest(".step"));
    }
  },

  image(event) {
    const place = document.querySelector(`[data-image="${event.image}"]`);
    const image = new Image();
    image.src = event.png;
    image.alt = `${place.closest(".step").querySelector("h3").textContent} image, ${event.size} pixels wide`;
    place.replaceChildren(image);
    opened(place.closest(".step"));
    if (event.image === begun.images.at(-1)) {
      const drawn = image.cloneNode();
      drawn.alt = "";
      Object.assign(drawn.style, box);
      $("drawn").append(drawn);
    }
  },

  again(event) {
    $("status").textContent = `The chain was not complete (${event.reason}): once more`;
  },

  done(event) {
    document.querySelector(".step.open")?.classList.remove("open");
    const [width] = begun.result;
    const shown = width < SMALL ? width * Math.ceil(SMALL / width) : width;
    for (const id of ["before", "after"]) $(id).src = `${CALLS}/${event.id}/${id === "before" ? id : "restored"}.png`;
    $("slider").classList.toggle("small", width < SMALL);
    $("slider").style.width = `${shown}px`;
    $("result").querySelector("p").style.width = `${shown}px`;
    $("download").href = `${CALLS}/${event.id}/restored.png`;
    $("download").download = `${photograph.name.replace(/\.[^.]*$/, "")}_restored.png`;
    $("result").hidden = false;
    $("status").textContent = `Done: ${event.tokens} tokens in ${event.seconds} s`;
    $("tile").hidden = true;
    $("drawn").replaceChildren();
  },

  failed(event) {
    $("status").textContent = "";
    $("message").textContent = event.message;
  },
};

/** A step of the chain, if this policy's chain has it. */
function card({ name, text, image }) {
  const [hasText, hasImage] = [begun.texts.includes(text), begun.images.includes(image)];
  if (!hasText && !hasImage) return null;
  const step = document.createElement("li");
  step.className = "step";
  const heading = document.createElement("h3");
  heading.textContent = name;
  step.append(heading);
  if (hasText) {
    const words = document.createElement("p");
    words.dataset.text = text;
    step.append(words);
  }
  if (hasImage) {
    const place = document.createElement("div");
    place.className = "picture";
    place.dataset.image = image;
    const bar = document.createElement("progress");
    bar.value = 0;
    bar.setAttribute("aria-label", `${name} image: codes drawn`);
    place.append(bar);
    step.append(place);
  }
  return step;
}

/** Marks the step as the one being written, if it is the furthest. */
function opened(step) {
  if (step.classList.contains("begun")) return;
  step.classList.add("begun");
  document.querySelector(".step.open")?.classList.remove("open");
  step.classList.add("open");
}

function take(file) {
  if (!file) return;
  photograph = file;
  $("photograph").src = URL.createObjectURL(file);
  restore();
}

$("file").addEventListener("change", () => take($("file").files[0]));
$("stop").addEventListener("click", () => running?.abort());
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (photograph) restore();
});
$("cut").addEventListener("input", () => $("slider").style.setProperty("--cut", `${$("cut").value}%`));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
  });
}
document.addEventListener("drop", (event) => take(event.dataTransfer.files[0]));
