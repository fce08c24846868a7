// What a network answers to sample images, as a list of pictures with yes or no.

import { CLASSES, Cifar10Net, isCifar10, samples } from "./cifar10.js";
import { call } from "./service.js";

// The elements to show for a card's file; none where its network is not for CIFAR-10's classes.
export async function answers(file) {
  if (!isCifar10(file.tensors)) return [];
  const network = new Cifar10Net(file);
  const condition = JSON.parse(file.metadata["rpg.condition"]);
  const isSet = Array.isArray(condition) && condition.length === CLASSES.length && condition.every((value) => value === 0 || value === 1);
  const images = await samples(await (await call("static/cifar10_samples.png")).blob());
  const list = document.createElement("ul");
  list.className = "answers";
  let right = 0;
  for (const { canvas, kind, pixels } of images) {
    const says = network.answer(pixels) > 0.5;
    const isWrong = isSet && says !== (condition[kind] === 1);
    if (!isWrong) right++;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", CLASSES[kind]);
    const text = document.createElement("span");
    text.textContent = `${CLASSES[kind]}: ${says ? "yes" : "no"}${isWrong ? ", wrong" : ""}`;
    const item = document.createElement("li");
    item.className = isWrong ? "wrong" : "";
    item.append(canvas, text);
    list.append(item);
  }
  const title = document.createElement("h3");
  title.textContent = "Its answers to test images";
  const note = document.createElement("p");
  note.className = "note";
  note.textContent = isSet
    ? `${right} of ${images.length} answers are right. The network runs in this browser.`
    : "The network runs in this browser.";
  return [title, note, list];
}
