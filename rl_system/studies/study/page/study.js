"use strict";

const CALLS = "api/participants";
const $ = (id) => document.getElementById(id);
// votes: image -> picture, in the order in which they were cast. busy: keys and clicks wait for what is under way.
const state = { code: null, images: 0, pictures: 0, votes: new Map(), at: 1, busy: false };

async function call(method, path, body) {
  const request = { method };
  if (body !== undefined) {
    request.headers = { "content-type": "application/json" };
    request.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(CALLS + path, request);
  } catch {
    throw new Error("The server does not answer. All earlier choices are stored; try this one again.");
  }
  const content = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw Object.assign(new Error(`Not done: ${content.error.message}.`), { kind: content.error.type });
  return content;
}

/** One thing at a time; what goes wrong is said aloud, and the page stays where it was. */
async function step(action) {
  if (state.busy) return;
  state.busy = true;
  $("message").textContent = "";
  try {
    await action();
  } catch (error) {
    $("message").textContent = error.message;
  } finally {
    state.busy = false;
  }
}

function show(section) {
  for (const id of ["start", "voting", "done"]) $(id).hidden = id !== section;
  $("progress").hidden = $("code").hidden = section === "start";
  $("bar").max = state.images;
  $("bar").value = state.votes.size;
  $("counted").textContent = `${state.votes.size} of ${state.images} chosen`;
  $("participant").textContent = state.code;
}

const address = (image, picture) => `${CALLS}/${state.code}/images/${image}/${picture}`;

async function load(image, picture) {
  const loaded = new Image();
  loaded.src = address(image, picture);
  try {
    await loaded.decode();
  } catch {
    throw new Error("A picture could not be loaded. Try again.");
  }
  return loaded;
}

async function open(image) {
  let focused;
  $("pictures").setAttribute("aria-busy", "true");
  try {
    const numbers = Array.from({ length: state.pictures + 1 }, (_, picture) => picture);
    const loaded = await Promise.all(numbers.map((picture) => load(image, picture)));
    state.at = image;
    state.size = [loaded[1].naturalWidth, loaded[1].naturalHeight];
    $("photograph").src = loaded[0].src;
    $("photograph").style.aspectRatio = state.size.join(" / ");
    focused = $("choices").contains(document.activeElement);
    $("choices").replaceChildren(...loaded.slice(1).map(choice));
  } finally {
    $("pictures").removeAttribute("aria-busy");
  }
  $("back").disabled = image === 1;
  $("forward").disabled = image === state.images && state.votes.size < state.images;
  $("undo").disabled = state.votes.size === 0;
  $("voting").setAttribute("aria-label", `Photograph ${image} of ${state.images} and its restorations`);
  show("voting");
  fit();
  if (focused) $("voting").focus({ preventScroll: true }); // no choice: a key held down must not vote again
  for (let picture = 0; image < state.images && picture <= state.pictures; picture++) {
    new Image().src = address(image + 1, picture);
  }
}

/** Cells of one size, as large as lets all be seen at once; not above the pictures' own, nor too small to judge. */
function fit() {
  const [gap, caption, edge] = [12, 30, 12];
  const cells = state.pictures + 1;
  const top = $("pictures").getBoundingClientRect().top + scrollY;
  const [width, height] = [$("voting").clientWidth, innerHeight - top - $("steps").offsetHeight - 60];
  const [w, h] = state.size;
  let [best, chosen] = [0, 1];
  for (let columns = cells; columns >= 1; columns--) {
    const rows = Math.ceil(cells / columns);
    const across = (width - gap * (columns - 1)) / columns;
    const down = (height - gap * (rows - 1)) / rows - caption - edge;
    const cell = Math.min(across, (down * w) / h + edge, Math.max(w, 300) + edge);
    if (cell > best * 1.05) [best, chosen] = [cell, columns]; // fewer rows, unless more make it clearly larger
  }
  const cell = Math.floor(Math.min(width, Math.max(220, best)));
  const columns = Math.min(chosen, Math.floor((width + gap) / (cell + gap)));
  $("pictures").style.setProperty("--columns", columns);
  $("pictures").style.setProperty("--cell", `${cell}px`);
}

function choice(picture, index) {
  const number = index + 1;
  const chosen = state.votes.get(state.at) === number;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "choice";
  button.setAttribute("aria-label", `Restoration ${number} of ${state.pictures}`);
  button.setAttribute("aria-keyshortcuts", String(number));
  button.setAttribute("aria-pressed", String(chosen));
  const frame = document.createElement("span");
  frame.className = "frame";
  picture.alt = "";
  frame.append(picture);
  const caption = document.createElement("span");
  const key = document.createElement("kbd");
  key.textContent = number;
  caption.append(key, chosen ? " your choice" : "");
  button.append(frame, caption);
  button.addEventListener("click", () => step(() => vote(number)));
  return button;
}

async function vote(picture) {
  const image = state.at;
  await call("PUT", `/${state.code}/votes/${image}`, { picture });
  state.votes.delete(image); // a vote cast again is the latest
  state.votes.set(image, picture);
  await onward(image);
}

/** The next photograph without a choice, after the one given; the end if there is none. */
async function onward(image) {
  for (let k = 1; k <= state.images; k++) {
    const next = ((image + k - 1) % state.images) + 1;
    if (!state.votes.has(next)) return open(next);
  }
  finish();
}

function finish() {
  show("done");
  $("done").querySelector("h2").focus();
}

async function back() {
  if (!$("done").hidden) return open(state.images);
  if (state.at > 1) await open(state.at - 1);
}

async function forward() {
  if (!$("done").hidden) return;
  if (state.at < state.images) return open(state.at + 1);
  if (state.votes.size === state.images) finish();
}

async function undo() {
  const last = [...state.votes.keys()].pop();
  if (last === undefined) return;
  await call("DELETE", `/${state.code}/votes/${last}`);
  state.votes.delete(last);
  await open(last);
}

function zoom() {
  const zoomed = $("pictures").classList.toggle("zoomed");
  $("zoom").setAttribute("aria-pressed", String(zoomed));
}

async function enter(code) {
  const known = await call("GET", `/${encodeURIComponent(code)}`);
  Object.assign(state, { code, images: known.images, pictures: known.pictures });
  state.votes = new Map(known.votes.map((vote) => [vote.image, vote.picture]));
  $("keys").textContent = `1 … ${state.pictures}`;
  localStorage.setItem("participant", code);
  history.replaceState(null, "", `?participant=${encodeURIComponent(code)}`);
  await onward(0);
}

async function begin() {
  await enter((await call("POST", "", {})).code);
}

/** On a computer that several people use: what is chosen stays with its participant's address. */
function other() {
  localStorage.removeItem("participant");
  history.replaceState(null, "", location.pathname);
  Object.assign(state, { code: null, votes: new Map() });
  show("start");
}

/** Go on as the participant of the address, else as the one that this browser knows; else welcome a new one. */
async function resume() {
  const named = new URLSearchParams(location.search).get("participant");
  const code = named ?? localStorage.getItem("participant");
  show("start");
  if (!code) return;
  try {
    await enter(code);
  } catch (error) {
    if (error.kind !== "no_participant") throw error;
    if (named) throw new Error("This address is of a participant whom this study does not know. You can begin anew.");
    localStorage.removeItem("participant"); // of another study at the same address
  }
}

const KEYS = { ArrowLeft: back, ArrowRight: forward, u: undo, Backspace: undo, z: zoom };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || !$("start").hidden) return;
  const number = Number(event.key) || Number(/^Digit([1-9])$/.exec(event.code)?.[1]); // AZERTY has other signs there
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) step(async () => action());
  else if (Number.isInteger(number) && number >= 1 && number <= state.pictures && !$("voting").hidden) {
    step(() => vote(number));
  } else return;
  event.preventDefault();
});

$("pictures").addEventListener("pointermove", (event) => {
  const frame = event.target.closest(".frame");
  if (!frame) return;
  const box = frame.getBoundingClientRect();
  $("pictures").style.setProperty("--x", `${(100 * (event.clientX - box.left)) / box.width}%`);
  $("pictures").style.setProperty("--y", `${(100 * (event.clientY - box.top)) / box.height}%`);
});

addEventListener("resize", () => $("voting").hidden || fit());

for (const [id, action] of Object.entries({ begin, back, forward, undo, zoom, other, review: back })) {
  $(id).addEventListener("click", () => step(async () => action()));
}

step(resume);
