// Without scripts the pictures of all steps stand beside each other, and nothing is missing.
"use strict";

const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

// A copy button beside every text to be copied. Where the clipboard is not to be had the text is
// selected instead.
for (const box of document.querySelectorAll(".copy")) {
  const code = box.querySelector("code");
  const button = make("button", { type: "button", textContent: "copy" });
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    } catch {
      getSelection().selectAllChildren(code);
    }
  };
  box.append(button);
}

// Before and after: the base's picture and the tuned model's, one over the other.
const shown = (row, part) =>
  [...row.querySelectorAll(`figure[data-part="${part}"]`)].find((figure) => !figure.hidden);
const wipes = [];
for (const row of document.querySelectorAll(".row")) {
  if (!shown(row, "base") || !shown(row, "tuned")) continue;
  const pair = make("div", { className: "pair" });
  const handle = make("input", { type: "range", min: 0, max: 100, value: 50, step: "any" });
  handle.setAttribute("aria-label", "before and after");
  handle.oninput = () => pair.style.setProperty("--cut", `${handle.value}%`);
  const caption = make("figcaption");
  caption.append(make("b", { textContent: "base | tuned" }), ": drag");
  const wipe = make("figure", { className: "wipe" }, pair, caption);
  row.querySelector(".cells").prepend(wipe);
  const draw = () => {
    const own = [shown(row, "base"), shown(row, "tuned")];
    wipe.hidden = !own.every(Boolean);
    if (wipe.hidden) return;
    pair.replaceChildren(...own.map((figure) => figure.querySelector("img").cloneNode()), handle);
    handle.oninput();
  };
  wipes.push(draw);
}

// The slider over steps, tied to the file of the step.
const picker = document.getElementById("picker");
if (picker) {
  const steps = [...document.querySelectorAll("#steps li")];
  const input = picker.querySelector("input");
  const file = picker.querySelector(".copy");
  const show = () => {
    const chosen = steps[input.value].dataset;
    picker.querySelector("output").value = chosen.step;
    file.hidden = !chosen.file;
    file.querySelector("code").textContent = chosen.file || "";
    picker.querySelector(".none").hidden = Boolean(chosen.file);
    for (const figure of document.querySelectorAll("figure[data-step]")) {
      figure.hidden = figure.dataset.step !== chosen.step;
    }
    wipes.forEach((draw) => draw());
  };
  input.oninput = show;
  picker.hidden = false;
  document.getElementById("steps").hidden = true;
  show();
} else {
  wipes.forEach((draw) => draw());
}

// One picture, as large as the window.
const zoom = make("dialog", { onclick: () => zoom.close() });
document.body.append(zoom);
for (const image of document.querySelectorAll("figure:not(.wipe) > img")) {
  image.classList.add("can-zoom");
  image.onclick = () => {
    zoom.replaceChildren(image.cloneNode());
    zoom.showModal();
  };
}
