"use strict";
// Shows the cases that all controls agree on. Values are numbers of tags and kinds: no text of a model is read here.
const controls = document.getElementById("filters");
const selects = [...controls.querySelectorAll("select")];
const search = controls.querySelector("input");
const cases = [...document.querySelectorAll("#cases li")].map((item) => ({
  item,
  card: item.closest("article"),
  text: item.textContent.toLowerCase(),
  sets: Object.fromEntries(selects.map((s) => [s.name, (item.dataset[s.name] ?? "").split(" ")])),
}));

function show() {
  const words = search.value.toLowerCase();
  const cards = new Set();
  let shown = 0;
  for (const { item, card, text, sets } of cases) {
    const fits = text.includes(words) && selects.every((s) => s.value === "" || sets[s.name].includes(s.value));
    item.hidden = !fits;
    shown += fits;
    if (fits) cards.add(card);
  }
  for (const { card } of cases) card.hidden = !cards.has(card);
  document.getElementById("shown").textContent = `${shown} of ${cases.length} cases`;
}

controls.addEventListener("input", show);
controls.hidden = false;
show();
