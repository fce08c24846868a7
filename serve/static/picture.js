// The picture: one strip a tensor, one cell a sampled weight, coloured by how far it lies from the centre.

const SVG = "http://www.w3.org/2000/svg";

export function draw(file, centre) {
  const strips = document.createElement("ul");
  strips.className = "strips";
  for (const tensor of centre.tensors) strips.append(row(tensor, differences(file, tensor)));
  return strips;
}

function differences(file, { name, numel, values }) {
  const places = values.map((_, k) => Math.floor((k * numel) / values.length));
  return file.valuesAt(name, places).map((value, k) => value - values[k]);
}

function row({ name }, values) {
  const largest = Math.max(...values.map(Math.abs));
  const title = document.createElement("code");
  title.textContent = name;
  const size = document.createElement("span");
  size.className = "size";
  size.textContent = `±${largest.toPrecision(2)}`;
  const item = document.createElement("li");
  item.append(title, strip(values, largest, `${name}: at most ${largest.toPrecision(2)} from the centre`), size);
  return item;
}

function strip(values, largest, label) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${values.length} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("shape-rendering", "crispEdges");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  values.forEach((value, k) => {
    const cell = document.createElementNS(SVG, "rect");
    cell.setAttribute("x", k);
    cell.setAttribute("width", 1);
    cell.setAttribute("height", 1);
    cell.setAttribute("class", value > 0 ? "above" : "below");
    cell.setAttribute("fill-opacity", largest ? Math.abs(value) / largest : 0);
    svg.append(cell);
  });
  return svg;
}
