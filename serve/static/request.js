// The form's values as a request's JSON. What is not a number goes as text: the service says what is wrong with it.

const MOST_TICKS = 64;

export class ConditionField {
  constructor() {
    this.box = document.getElementById("condition");
    this.text = document.getElementById("describe");
    this.description = document.getElementById("description");
    this.classes = document.getElementById("classes");
    this.ticks = this.classes.querySelector(".ticks");
    this.understood = document.getElementById("understood");
    this.numbers = document.getElementById("numbers");
    this.numbers.addEventListener("input", () => this.tick());
  }

  // Ask for what `generator` takes.
  show(generator) {
    this.size = generator.condition === "vector" ? generator.condition_size : 0;
    this.describes = generator.descriptions;
    // Of the values that a description is understood as.
    this.names = generator.classes;
    this.reading = null;
    this.text.hidden = !this.describes;
    this.box.hidden = this.size === 0 || (this.describes && !this.names);
    this.classes.hidden = this.size > MOST_TICKS;
    document.getElementById("understand").hidden = this.understood.hidden = !this.names;
    document.getElementById("typed").hidden = Boolean(this.names);
    document.getElementById("description-note").textContent = this.names
      ? "What the network shall say yes to. You see how it is understood, and can change that."
      : "What the networks are for, in words. The generator's text encoder makes its condition of it.";
    document.getElementById("width").textContent = this.size;
    document.getElementById("numbers-note").textContent = this.classes.hidden
      ? "Separated by spaces or commas."
      : "A ticked class is 1, any other 0. Other numbers can be typed.";
    this.numbers.value = this.classes.hidden ? "" : Array(this.size).fill(0).join(" ");
    this.ticks.replaceChildren(...(this.classes.hidden ? [] : Array.from({ length: this.size }, (_, i) => this.newTick(i))));
    this.understood.textContent = "";
  }

  // The description that is still to be understood; null where there is none.
  unread() {
    const text = this.description.value;
    return this.names && text.trim() && text !== this.reading?.description ? text : null;
  }

  // Show what was understood of a description, for the user to change.
  read(description, { classes, sureness, is_sure: isSure }) {
    const bits = classes.map(({ meant }) => (meant ? "1" : "0"));
    this.reading = { description, isSure, bits: bits.join(" ") };
    this.numbers.value = this.reading.bits;
    this.tick();
    this.ticks.querySelectorAll(".likely").forEach((likely, i) => {
      likely.textContent = `${Math.round(100 * classes[i].probability)}\u00a0%`;
    });
    const meant = classes.filter((each) => each.meant).map(({ name }) => name).join(", ") || "none of the classes";
    this.understood.textContent = isSure
      ? `Understood: ${meant}. Sureness ${sureness.toFixed(2)}.`
      : `Not sure what is meant, perhaps ${meant} (sureness ${sureness.toFixed(2)}). Tick what you mean, then generate.`;
    return isSure;
  }

  // What the request is to ask for.
  value() {
    if (this.names) return this.asked();
    if (this.describes) return { descriptions: [this.description.value] };
    return { conditions: this.size ? [this.words().map(numberOrText)] : null };
  }

  // By the description, as long as its classes were left as they were understood.
  asked() {
    const { reading } = this;
    if (reading && reading.isSure && reading.description === this.description.value && reading.bits === this.numbers.value)
      return { descriptions: [reading.description] };
    const bits = this.words().map(Number);
    if (new Set(bits).size < 2) throw new Error("describe what the network shall say yes to, or tick some of the classes, not all");
    return { conditions: [bits] };
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
    label.append(input, this.names ? this.names[i] : String(i));
    if (this.names) {
      const likely = document.createElement("span");
      likely.className = "likely";
      label.append(likely);
    }
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
