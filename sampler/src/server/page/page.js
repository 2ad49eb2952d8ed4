// Talks to the jobs API of the server it comes from, and to nothing else.

const $ = (selector) => document.querySelector(selector);
const form = $("#settings");
const field = form.elements;
let capabilities;
let mode = "create";
let running = []; // Ids of the jobs that Cancel stops.

// ---- server ---------------------------------------------------------------------------------

async function request(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers };
  if (token) headers.authorization = `Bearer ${token}`;
  if (options.body) headers["content-type"] = "application/json";
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askToken();
    return request(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
  }
  return response;
}

function askToken() {
  const dialog = $("#ask-token");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("token", dialog.querySelector("input").value.trim());
      resolve();
    }, { once: true });
  });
}

/** Server-sent events of a response, each as {event, data}. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const lines = text.slice(0, end).split("\n");
      text = text.slice(end + 2);
      const of = (name) => lines.filter((l) => l.startsWith(`${name}: `)).map((l) => l.slice(name.length + 2)).join("\n");
      if (of("data")) yield { event: of("event"), data: JSON.parse(of("data")) };
    }
  }
}

/** Draws one image; `watch` sees {share, text, preview}. Resolves to {blob, job}. */
async function draw(body, watch) {
  const response = await request("/api/jobs", { method: "POST", body: JSON.stringify(body) });
  const { id } = await response.json();
  running.push(id);
  try {
    for await (const { event, data } of events(await request(`/api/jobs/${id}/events`))) {
      if (event === "preview") watch({ preview: data.url });
      else if (event === "progress") watch({ share: data.step / data.of, text: said(data) });
      else if (event === "done") {
        const file = await request(data.images[0].url);
        return { blob: await file.blob(), job: data };
      } else if (event === "cancelled") throw new Error("cancelled");
      else if (event === "failed") throw new Error(data.error);
    }
    throw new Error("the server ended the connection");
  } finally {
    running = running.filter((other) => other !== id);
  }
}

function said(job) {
  if (job.state === "queued") return `waiting, images ahead: ${job.images_ahead ?? 0}`;
  const left = job.seconds_left == null ? "" : `, ${job.seconds_left.toFixed(job.seconds_left < 10 ? 1 : 0)} s left`;
  return `step ${job.step} of ${job.of}${left}`;
}

// ---- settings -------------------------------------------------------------------------------

const modelOf = (name) => capabilities.models.find((model) => model.name === name);
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
const options = (select, names) => select.replaceChildren(...names.map((name) => new Option(name, name)));

function body(model, prompt, seed) {
  const number = (name) => (field[name].value === "" ? undefined : Number(field[name].value));
  const lora = field.lora.value;
  return {
    model, prompt, seed,
    width: number("width"), height: number("height"), steps: number("steps"),
    solver: field.solver.value,
    guidance: modelOf(model).guidance ? number("guidance") : undefined,
    lora: lora ? { name: lora, scale: number("scale") } : undefined,
  };
}

/** The typed seed as a number that JSON carries whole, else a new one. */
function seedTyped() {
  const typed = field.seed.value.trim();
  return typed === "" ? randomSeed() : Number(typed);
}

function adopt(model) {
  for (const side of ["width", "height"]) {
    field[side].value = model[side];
    field[side].step = field[side].min = model.multiple;
  }
  show('[data-if="guidance"]', model.guidance);
  field.lora.replaceChildren(new Option("none", ""), ...model.loras.map((name) => new Option(name, name)));
  show('[data-if="lora"]', model.loras.length > 0);
}

function show(selector, on) {
  for (const element of document.querySelectorAll(selector)) element.hidden = !on;
}

async function start() {
  capabilities = await (await request("/api/capabilities")).json();
  const names = capabilities.models.map((model) => model.name);
  options(field.model, names);
  options(field.other, names);
  field.other.selectedIndex = names.length > 1 ? 1 : 0;
  options(field.solver, capabilities.solvers);
  field.solver.value = capabilities.defaults.solver;
  field.steps.value = capabilities.defaults.steps;
  field.steps.max = capabilities.limits.steps;
  adopt(capabilities.models[0]);
  field.model.addEventListener("change", () => adopt(modelOf(field.model.value)));
  await listHistory();
}

// ---- tabs, progress, errors -----------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];

function turnTo(name) {
  mode = name;
  for (const tab of tabs) {
    const on = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
    $(`#${tab.getAttribute("aria-controls")}`).hidden = !on;
  }
  for (const element of form.querySelectorAll("[data-in]")) {
    element.hidden = !element.dataset.in.split(" ").includes(name);
  }
  complain(null);
}

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => turnTo(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = tabs[(index + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
});

function watchBar({ share, text }) {
  if (share !== undefined) $("#progress progress").value = share;
  if (text !== undefined) $("#status").textContent = text;
}

function complain(error) {
  $("#error").hidden = !error;
  $("#error").textContent = error?.message ?? "";
}

function put(image, blob) {
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 256);
  image.src = typeof blob === "string" ? blob : URL.createObjectURL(blob);
}

/** Runs `work` with the bar shown and Cancel at hand. */
async function busy(work) {
  complain(null);
  $("#progress").hidden = false;
  watchBar({ share: 0, text: "" });
  form.querySelector("[type=submit]").disabled = true;
  $("#cancel").disabled = false;
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    $("#progress").hidden = true;
    form.querySelector("[type=submit]").disabled = false;
    $("#cancel").disabled = true;
  }
}

$("#cancel").addEventListener("click", () => {
  for (const id of running) request(`/api/jobs/${id}/cancel`, { method: "POST" }).catch(complain);
});

// ---- create, compare ------------------------------------------------------------------------

const caption = (job) =>
  `${job.prompt} · ${job.model} · ${job.width}×${job.height}, ${job.steps} steps, ${job.solver}, seed ${job.images[0].seed}`;

async function create() {
  const figure = $("#result");
  const wish = { ...body(field.model.value, field.prompt.value, seedTyped()), previews: 4 };
  const { blob, job } = await draw(wish, (news) => {
    watchBar(news);
    if (news.preview) {
      figure.hidden = false;
      figure.querySelector("figcaption").textContent = "preview";
      put(figure.querySelector("img"), news.preview);
    }
  });
  showResult(blob, job);
  await remember(blob, job);
  await listHistory();
}

function showResult(blob, job) {
  const figure = $("#result");
  figure.hidden = false;
  put(figure.querySelector("img"), blob);
  figure.querySelector("img").alt = job.prompt;
  const link = document.createElement("a");
  link.href = figure.querySelector("img").src;
  link.download = `${job.model}-${job.images[0].seed}.png`;
  link.textContent = "download";
  figure.querySelector("figcaption").replaceChildren(`${caption(job)} · `, link);
}

async function compare() {
  const seed = seedTyped();
  const names = [field.model.value, field.other.value];
  const pair = await Promise.all(names.map((name) => draw(body(name, field.prompt.value, seed), watchBar)));
  const figure = $("#slider");
  figure.hidden = false;
  put(figure.querySelector(".a"), pair[0].blob);
  put(figure.querySelector(".b"), pair[1].blob);
  const job = pair[0].job;
  figure.querySelector(".pair").style.setProperty("--ratio", `${job.width} / ${job.height}`);
  figure.querySelector("figcaption").textContent = `left ${names[0]}, right ${names[1]} · ${job.prompt} · seed ${seed}`;
}

$("#slider input").addEventListener("input", (event) => {
  $("#slider .pair").style.setProperty("--cut", `${event.target.value}%`);
});

// ---- history: kept in this browser ----------------------------------------------------------

const HISTORY = 100;

function shelf(mode) {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("ng-sample", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("images", { autoIncrement: true });
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => resolve(opening.result.transaction("images", mode).objectStore("images"));
  });
}

const result = (ask) => new Promise((resolve, reject) => {
  ask.onsuccess = () => resolve(ask.result);
  ask.onerror = () => reject(ask.error);
});

async function remember(blob, job) {
  const store = await shelf("readwrite");
  await result(store.add({ blob, job }));
  const keys = await result(store.getAllKeys());
  await Promise.all(keys.slice(0, -HISTORY).map((key) => result(store.delete(key))));
}

async function listHistory() {
  const entries = await result((await shelf("readonly")).getAll());
  $("#forget").hidden = entries.length === 0;
  $("#history").replaceChildren(...entries.reverse().map(({ blob, job }) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = new Image();
    button.type = "button";
    button.title = caption(job);
    image.alt = job.prompt;
    put(image, blob);
    button.append(image);
    button.addEventListener("click", () => recall(blob, job));
    item.append(button);
    return item;
  }));
}

function recall(blob, job) {
  for (const name of ["prompt", "width", "height", "steps", "solver"]) field[name].value = job[name];
  if (modelOf(job.model)) field.model.value = job.model;
  field.seed.value = job.images[0].seed;
  showResult(blob, job);
}

$("#forget").addEventListener("click", async () => {
  await result((await shelf("readwrite")).clear());
  await listHistory();
});

// ---- votes ----------------------------------------------------------------------------------

let study; // {names, prompts, seed, settings, votes, pairs}

async function startVotes() {
  const prompts = field.prompts.value.split("\n").map((line) => line.trim()).filter(Boolean);
  const names = [field.model.value, field.other.value];
  if (prompts.length === 0) throw new Error("write at least one prompt, one a line");
  if (names[0] === names[1]) throw new Error("choose two different models");
  study = { names, prompts, seed: seedTyped(), votes: [], pairs: new Map() };
  $("#outcome").hidden = true;
  await nextPair();
}

/** The images of pair `index`, drawn once; sides are shuffled here and told to nobody. */
function pair(index) {
  const { names, prompts, seed, pairs } = study;
  if (!pairs.has(index)) {
    const swapped = crypto.getRandomValues(new Uint8Array(1))[0] % 2 === 1;
    const drawn = Promise.all(names.map((name) => draw(body(name, prompts[index], seed + index), watchBar)));
    drawn.catch(() => pairs.delete(index));
    pairs.set(index, { swapped, drawn });
  }
  return pairs.get(index);
}

async function nextPair() {
  const index = study.votes.length;
  if (index === study.prompts.length) return showOutcome();
  $("#ballot").hidden = true;
  const { swapped, drawn } = pair(index);
  const images = await drawn;
  const [left, right] = swapped ? [images[1], images[0]] : images;
  put($("#left img"), left.blob);
  put($("#right img"), right.blob);
  $("#question").textContent = `${index + 1} of ${study.prompts.length}: ${study.prompts[index]}`;
  $("#undo").disabled = index === 0;
  $("#ballot").hidden = false;
  study.shown = performance.now();
  // Neither side: a frame around one would be a hint.
  $("#question").focus({ preventScroll: true });
  if (index + 1 < study.prompts.length) pair(index + 1).drawn.catch(() => {});
}

function vote(side) {
  if (mode !== "vote" || !study || $("#ballot").hidden) return;
  const index = study.votes.length;
  const { swapped } = pair(index);
  const first = side === (swapped ? "right" : "left");
  study.votes.push({
    prompt: study.prompts[index],
    seed: study.seed + index,
    winner: side === "tie" ? null : study.names[first ? 0 : 1],
    left: study.names[swapped ? 1 : 0],
    seconds: Math.round(performance.now() - study.shown) / 1000,
  });
  busy(nextPair);
}

function undo() {
  if (!study || study.votes.length === 0 || $("#ballot").hidden) return;
  study.votes.pop();
  busy(nextPair);
}

/** Wilson's interval at 95 % for a share of `n`. */
function wilson(share, n) {
  const z = 1.959963984540054;
  const middle = (share + z * z / (2 * n)) / (1 + z * z / n);
  const half = z * Math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n);
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

function showOutcome() {
  const { names, votes } = study;
  $("#ballot").hidden = true;
  $("#outcome").hidden = false;
  if (votes.length === 0) {
    $("#verdict").textContent = "No votes.";
    return;
  }
  const count = (winner) => votes.filter((vote) => vote.winner === winner).length;
  const [wins, losses, ties] = [count(names[0]), count(names[1]), count(null)];
  const share = (wins + ties / 2) / votes.length;
  const interval = wilson(share, votes.length);
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  $("#verdict").textContent = `${names[0]} against ${names[1]}: ${percent(share)} of ${votes.length} votes ` +
    `(95 % interval ${percent(interval[0])} to ${percent(interval[1])}); ${wins} won, ${losses} lost, ${ties} the same`;
  $("#outcome meter").value = share;
  const file = {
    kind: "ng-votes", version: 1, models: names, votes,
    wins: { share, interval, level: 0.95, won: wins, lost: losses, tied: ties },
  };
  const link = $("#save");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 2)], { type: "application/json" }));
}

for (const side of ["left", "right", "tie"]) $(`#${side}`).addEventListener("click", () => vote(side));
$("#undo").addEventListener("click", undo);
$("#stop").addEventListener("click", showOutcome);

// ---- keys -----------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("#cancel").disabled) return $("#cancel").click();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return form.requestSubmit();
  const typing = event.target.closest("input, textarea, select, [role=tab]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || mode !== "vote") return;
  const act = {
    ArrowLeft: () => vote("left"),
    ArrowRight: () => vote("right"),
    ArrowDown: () => vote("tie"),
    u: undo,
    s: () => study && !$("#ballot").hidden && showOutcome(),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (form.querySelector("[type=submit]").disabled) return;
  busy({ create, compare, vote: startVotes }[mode]);
});

start().catch(complain);
