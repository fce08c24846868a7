// One generated network: what is known of its file, its picture, and the file itself to save.

import { ModelFile } from "./model_file.js";
import { draw } from "./picture.js";
import { ask, call, download, saveBlob } from "./service.js";

// A larger file is not loaded for its picture.
const LARGEST = 64e6;
const HEADER = 1e6;

export class Card {
  // `index` is asked for; where it is not made yet, the first one after it stands in.
  static async load(job, index) {
    const { models, weights } = await ask(`v1/jobs/${job.id}/models?start=${index}&limit=1`);
    if (!models.length) return null;
    const card = new Card(job, models[0], weights);
    await card.read();
    return card;
  }

  // `weights` is what the file of weights is called in the model's directory; null where a model is one file.
  constructor(job, model, weights) {
    this.job = job;
    this.model = model;
    this.path = `v1/jobs/${job.id}/models/${model.index}`;
    this.weights = weights ? `${this.path}/files/${weights}` : this.path;
    this.isDirectory = Boolean(weights);
    this.name = `${job.id}_model_${String(model.index).padStart(6, "0")}.${weights ? "tar" : "safetensors"}`;
    this.whole = model.bytes <= LARGEST;
  }

  async read() {
    const buffer = this.whole ? await (await call(this.weights)).arrayBuffer() : await this.header();
    this.checked = false;
    // Browsers hash only where the connection is secure or local.
    if (this.whole && crypto.subtle) {
      if (hex(await crypto.subtle.digest("SHA-256", buffer)) !== this.model.sha256)
        throw new Error(`model ${this.model.index}: the file that arrived has another SHA-256 than the service's`);
      this.checked = true;
    }
    if (this.whole && !this.isDirectory) this.blob = new Blob([buffer], { type: "application/octet-stream" });
    this.file = new ModelFile(buffer);
  }

  // The file's beginning, as far as its header goes.
  async header() {
    const buffer = await this.beginning(HEADER);
    const end = ModelFile.headerEnd(buffer);
    return end > buffer.byteLength ? this.beginning(end) : buffer;
  }

  async beginning(size) {
    return (await call(this.weights, { headers: { Range: `bytes=0-${size - 1}` } })).arrayBuffer();
  }

  // [name, value, whether it is code] of everything that is known.
  facts() {
    const { metadata, tensors } = this.file;
    const values = Object.values(tensors).reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);
    const condition = JSON.parse(metadata["rpg.condition"]);
    const sampling = JSON.parse(metadata["rpg.sampling"]);
    const worth = [];
    for (const [name, value] of Object.entries(this.model.metrics ?? {}))
      worth.push([name.charAt(0).toUpperCase() + name.slice(1), `${name === "accuracy" ? value.toFixed(3) : Number(value.toPrecision(4))} on test data`]);
    if (this.model.failure) worth.push(["Not measured", this.model.failure]);
    if (this.model.similarity !== null)
      worth.push(["Similarity", `${this.model.similarity.toFixed(3)}: overlap of its errors with those of the nearest original`]);
    return [
      ...worth,
      [this.checked ? "SHA-256, checked" : "SHA-256", this.model.sha256, true],
      ["Size", `${bytes(this.model.bytes)}: ${count(Object.keys(tensors).length)} tensors, ${count(values)} values`],
      this.model.description === null
        ? ["Condition", condition === null ? "none" : condition.join(" "), condition !== null]
        : ["Description", this.model.description],
      ["Seed, model", `${metadata["rpg.seed"]}, ${metadata["rpg.index"]}`],
      ["Sampler", `${sampling.solver}, ${sampling.steps} steps`],
      ["Generator", this.job.generator],
      ["Its digest", metadata["rpg.generator"], true],
    ];
  }

  // What the picture shows, in words, and the picture where there is one.
  async picture() {
    if (!this.whole) return ["Left out: the file is larger than 64 MB.", null];
    const centre = await ask(`v1/generators/${encodeURIComponent(this.job.generator)}/centre`);
    if (centre.digest !== this.file.metadata["rpg.generator"])
      return ["Left out: the generator has been replaced since this network was made.", null];
    if (!centre.tensors.length) return ["Left out: this generator changes no weights.", null];
    return [null, draw(this.file, centre)];
  }

  save() {
    if (this.blob) saveBlob(this.blob, this.name);
    else return download(this.path, this.name);
  }
}

export const count = (number) => number.toLocaleString("en");

export function bytes(number) {
  for (const unit of ["B", "kB", "MB"]) {
    if (number < 1000) return `${unit === "B" ? number : number.toPrecision(3)} ${unit}`;
    number /= 1000;
  }
  return `${count(Number(number.toPrecision(3)))} GB`;
}

const hex = (buffer) => [...new Uint8Array(buffer)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
