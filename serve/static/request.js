// The form's values as a request's JSON. What is not a number goes as text: the service says what is wrong with it.

const MOST_TICKS = 64;

export class ConditionField {
  constructor() {
    this.box = document.getElementById("condition");
    this.text = document.getElementById("describe");
    this.description = document.getElementById("description");
    this.classes = document.getElementById("classes");
    this.ticks = this.classes.querySelector(".ticks");
    this.numbers = document.getElementById("numbers");
    this.numbers.addEventListener("input", () => this.tick());
  }

  // Ask for what `generator` takes.
  show(generator) {
    this.size = generator.condition === "vector" ? generator.condition_size : 0;
    this.describes = generator.descriptions;
    this.text.hidden = !this.describes;
    this.box.hidden = this.size === 0 || this.describes;
    this.classes.hidden = this.size > MOST_TICKS;
    document.getElementById("width").textContent = this.size;
    document.getElementById("numbers-note").textContent = this.classes.hidden
      ? "Separated by spaces or commas."
      : "A ticked class is 1, any other 0. Other numbers can be typed.";
    this.numbers.value = this.classes.hidden ? "" : Array(this.size).fill(0).join(" ");
    this.ticks.replaceChildren(...(this.classes.hidden ? [] : Array.from({ length: this.size }, (_, i) => this.newTick(i))));
  }

  // What the request is to ask for.
  value() {
    if (this.describes) return { descriptions: [this.description.value] };
    return { conditions: this.size ? [this.words().map(numberOrText)] : null };
  }

  words() {
    return this.numbers.value.split(/[\s,]+/).filter(Boolean);
  }

  newTick(i) {
    const input = document.createElement("input");
    input.type = "checkbox";
    input.addEventListener("change", () => {
      const words = this.words();
      while (words.length < this.size) words.push("0");
      words[i] = input.checked ? "1" : "0";
      this.numbers.value = words.join(" ");
    });
    const label = document.createElement("label");
    label.append(input, String(i));
    return label;
  }

  tick() {
    const words = this.words();
    this.ticks.querySelectorAll("input").forEach((input, i) => {
      const value = i < words.length ? Number(words[i]) : 0;
      input.checked = value === 1;
      input.indeterminate = value !== 1 && value !== 0;
    });
  }
}

export function requestBody(generator, asked, number, seed, evaluate) {
  const rest = JSON.stringify({ generator, ...asked, number: numberOrText(number), evaluate });
  // Seeds go up to 2^64, further than a number is exact here.
  const exact = /^-?\d+$/.test(seed.trim()) ? BigInt(seed.trim()).toString() : JSON.stringify(seed);
  return `${rest.slice(0, -1)},"seed":${exact}}`;
}

function numberOrText(text) {
  const value = Number(text);
  return text.trim() !== "" && Number.isFinite(value) ? value : text;
}
