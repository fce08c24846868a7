// The page: choose a generator, ask for networks, watch the job, look at what came out.

import { answers } from "./answers.js";
import { Card, bytes, count } from "./card.js";
import { ConditionField, requestBody } from "./request.js";
import { ask, call, download, follow, getToken, setToken } from "./service.js";

const at = (id) => document.getElementById(id);
const condition = new ConditionField();
let generators = [];
let watching = new AbortController();
let job = null;
let card = null;

function tell(error) {
  at("error").textContent = error ? error.message : "";
  at("error").hidden = !error;
  if (error) at("error").scrollIntoView({ block: "nearest" });
}

// Do something that may be refused; what it is refused with is shown until the next thing is done.
async function attempt(action) {
  tell(null);
  try {
    await action();
  } catch (error) {
    tell(error);
  }
}

async function loadGenerators() {
  generators = (await ask("v1/generators")).generators;
  at("generator").replaceChildren(...generators.map(({ name }) => new Option(name, name)));
  at("ask").hidden = false;
  showGenerator();
}

function showGenerator() {
  const chosen = generators.find(({ name }) => name === at("generator").value);
  if (!chosen) return;
  condition.show(chosen);
  at("evaluation").hidden = !chosen.evaluates;
  const facts = chosen.ready
    ? [`networks of ${bytes(chosen.model_bytes)}`, `${chosen.sampling.steps} ${chosen.sampling.steps === 1 ? "step" : "steps"} of ${chosen.sampling.solver}`, `on ${chosen.device}`]
    : ["not started yet: a job waits for it"];
  if (chosen.models_per_second) facts.push(`${count(Number(chosen.models_per_second.toPrecision(2)))} models/s`);
  if (!condition.size) facts.push("takes no condition");
  at("generator-note").textContent = facts.join(", ");
}

// Show how the description is understood; whether that is sure.
async function understand(description) {
  const headers = { "Content-Type": "application/json" };
  const path = `v1/generators/${encodeURIComponent(at("generator").value)}/understand`;
  return condition.read(description, await ask(path, { method: "POST", headers, body: JSON.stringify({ description }) }));
}

async function submit() {
  const description = condition.unread();
  // What is not sure is for the user to say.
  if (description !== null && !(await understand(description))) return;
  const evaluate = !at("evaluation").hidden && at("evaluate").checked;
  const body = requestBody(at("generator").value, condition.value(), at("number").value, at("seed").value, evaluate);
  const headers = { "Content-Type": "application/json" };
  const accepted = await ask("v1/jobs", { method: "POST", headers, body });
  // A reload, or a copied address, comes back to this job.
  history.replaceState(null, "", `#${accepted.id}`);
  await watch(accepted.id);
}

async function cancel() {
  const path = `v1/jobs/${job.id}`;
  // Of a job that has ended, the same call would remove the models.
  if ((await ask(path)).ended === null) await call(path, { method: "DELETE" });
}

async function watch(id) {
  watching.abort();
  watching = new AbortController();
  const { signal } = watching;
  card = null;
  at("network").hidden = true;
  let shown = false;
  for await (const news of follow(id, signal)) {
    if (signal.aborted) return;
    job = news;
    showJob();
    // Once: whoever scrolls elsewhere is left alone.
    if (!shown) at("job").scrollIntoView({ block: "nearest" });
    shown = true;
    if (!card && job.finished) await showModel(0);
  }
}

function showJob() {
  at("job").hidden = false;
  at("job-id").textContent = job.id;
  at("progress").max = job.models;
  at("progress").value = job.finished;
  const facts = [`${job.state}: ${count(job.finished)} of ${count(job.models)} ${job.models === 1 ? "model" : "models"}`];
  if (job.ended === null && job.models_per_second) facts.push(`${job.models_per_second.toPrecision(2)} a second`);
  if (job.ended === null && job.seconds_left !== null) facts.push(`${Math.ceil(job.seconds_left)} s left`);
  if (job.ended !== null && job.started !== null) facts.push(`${(job.ended - job.started).toFixed(1)} s`);
  if (job.accuracy !== null) facts.push(`mean accuracy ${job.accuracy.toFixed(3)}`);
  at("job-state").textContent = facts.join(", ") + (job.error ? `. ${job.error}` : "");
  at("cancel").hidden = job.ended !== null;
  at("choose").hidden = job.models === 1;
  at("of").textContent = `of 0 to ${job.models - 1}`;
  at("index").max = job.models - 1;
  at("archive").hidden = job.ended === null || job.finished < 2;
}

async function showModel(index) {
  const { id } = job;
  const loaded = await Card.load(job, index);
  if (id !== job.id) return;
  if (!loaded) throw new Error(`no model from ${index} on is made yet`);
  card = loaded;
  at("index").value = card.model.index;
  at("card").replaceChildren(...card.facts().flatMap(([name, value, isCode]) => {
    const term = document.createElement("dt");
    term.textContent = name;
    const text = document.createElement(isCode ? "code" : "span");
    text.textContent = value;
    const detail = document.createElement("dd");
    detail.append(text);
    return [term, detail];
  }));
  at("answers").replaceChildren();
  at("network").hidden = false;
  const shown = await answers(loaded.file);
  if (loaded !== card) return;
  at("answers").replaceChildren(...shown);
  const [reason, picture] = await loaded.picture();
  if (loaded === card) showPicture(reason, picture);
}

function showPicture(reason, picture) {
  const title = document.createElement("h3");
  title.textContent = "Weights against the centre";
  const note = document.createElement("p");
  note.className = "note";
  if (reason) note.textContent = reason;
  else {
    const [above, below] = ["above", "below"].map((side) => {
      const key = document.createElement("span");
      key.className = `key ${side}`;
      return key;
    });
    note.append("Generated weight minus that of the mean training checkpoint, at up to 64 places of each tensor: ",
      above, "\u00a0larger, ", below, "\u00a0smaller; the strongest colour is the number at the right.");
  }
  at("picture").replaceChildren(title, note, ...(picture ? [picture] : []));
}

async function start() {
  const { components } = await ask("openapi.json");
  at("sign-in").hidden = !components.securitySchemes;
  if (components.securitySchemes && !getToken()) {
    at("token").focus();
    return;
  }
  at("token").value = getToken();
  await loadGenerators();
  if (location.hash.length > 1) await watch(encodeURIComponent(location.hash.slice(1)));
}

at("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken(at("token").value.trim());
  attempt(async () => {
    await loadGenerators();
    at("generator").focus();
  });
});
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(submit);
});
at("understand").addEventListener("click", () => attempt(() => understand(at("description").value)));
at("generator").addEventListener("change", showGenerator);
at("cancel").addEventListener("click", () => attempt(cancel));
at("index").addEventListener("change", () => attempt(() => showModel(Number(at("index").value))));
at("download").addEventListener("click", () => attempt(() => card.save()));
at("archive").addEventListener("click", () => attempt(() => download(`v1/jobs/${job.id}/archive`, `${job.id}.tar`)));
attempt(start);
