"use strict";
// One token of one text is chosen at a time. Left and right go through the explained tokens, up and down through lines.
const root = document.documentElement;
const texts = [...document.querySelectorAll(".reading")];
const links = [...document.querySelectorAll(".texts a")];

function tokensOf(text) {
  return [...text.querySelectorAll("a.token")];
}

const tokenAt = new Map(texts.flatMap(tokensOf).map((token) => [token.hash, token]));

function showText(text) {
  texts.forEach((other) => other.classList.toggle("current", other === text));
  links.forEach((link) => {
    if (link.hash === "#" + text.id) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  });
}

function choose(token) {
  const text = token.closest(".reading");
  showText(text);
  const before = chosenIn(text);
  if (before) {
    before.tabIndex = -1;
    before.removeAttribute("aria-current");
    articleOf(before).classList.remove("chosen");
  }
  token.tabIndex = 0;
  token.setAttribute("aria-current", "true");
  articleOf(token).classList.add("chosen");
  text.querySelector(".panel").scrollTop = 0;
}

function articleOf(token) {
  return document.getElementById(token.hash.slice(1));
}

function chosenIn(text) {
  return text.querySelector("a.token[aria-current]");
}

function follow(hash) {
  const text = texts.find((other) => "#" + other.id === hash);
  const token = text ? chosenIn(text) : tokenAt.get(hash);
  if (token) choose(token);
  else if (text) showText(text);
  return token || text;
}

// The explained token on the nearest other line in the direction of `sign`, nearest across.
function across(token, tokens, sign) {
  const from = token.getClientRects()[0];
  let best = token, least = Infinity;
  for (const other of tokens) {
    const to = other.getClientRects()[0];
    const down = sign * (to.top - from.top);
    if (down < from.height / 2) continue;
    const distance = 1000 * down + Math.abs(to.left - from.left);
    if (distance < least) [best, least] = [other, distance];
  }
  return best;
}

function moved(key, token) {
  const tokens = tokensOf(token.closest(".reading"));
  const at = tokens.indexOf(token);
  switch (key) {
    case "ArrowRight": return tokens[Math.min(at + 1, tokens.length - 1)];
    case "ArrowLeft": return tokens[Math.max(at - 1, 0)];
    case "ArrowDown": return across(token, tokens, 1);
    case "ArrowUp": return across(token, tokens, -1);
    case "Home": return tokens[0];
    case "End": return tokens[tokens.length - 1];
  }
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a.token, .texts a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  follow(link.hash);
  history.replaceState(null, "", link.hash);
});
document.addEventListener("focusin", (event) => {
  const token = event.target.closest("a.token");
  if (token) choose(token);
});
document.addEventListener("keydown", (event) => {
  const token = event.target.closest("a.token");
  if (!token || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const next = moved(event.key, token);
  if (!next) return;
  event.preventDefault();
  next.focus({preventScroll: true});
  next.scrollIntoView({block: "nearest"});
});
window.addEventListener("hashchange", () => follow(location.hash));

// Every text starts at its first token that lies where the NLA was trained.
root.classList.add("scripted");
for (const text of [...texts].reverse()) {
  const tokens = tokensOf(text);
  for (const token of tokens) token.tabIndex = -1;
  const first = tokens.find((token) => !token.classList.contains("early")) || tokens[0];
  if (first) choose(first);
  else showText(text);
}
follow(location.hash);
