// SPDX-License-Identifier: Apache-2.0
// Sortable tables, a light and dark switch, copy buttons. The page reads whole without any of it.
(() => {
  "use strict";

  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.sort === undefined ? cell.textContent.trim() : cell.dataset.sort;
  };
  const isMissing = (key) => key === "" || key === "nan";

  const sortBy = (table, column, ascending) => {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    const keys = new Map(rows.map((row) => [row, keyOf(row, column)]));
    const numeric = rows.every((row) => isMissing(keys.get(row)) || !Number.isNaN(Number(keys.get(row).replace("inf", "Infinity"))));
    const number = (key) => Number(key.replace("inf", "Infinity"));
    rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (isMissing(x) || isMissing(y)) return isMissing(x) - isMissing(y); // missing values stay last both ways
      const order = numeric ? number(x) - number(y) : x.localeCompare(y, "en", { numeric: true });
      return ascending ? order : -order;
    });
    rows.forEach((row) => body.append(row));
  };

  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sortBy(table, column, ascending);
      });
    });
  });

  const root = document.documentElement;
  const toggle = document.getElementById("theme");
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const remember = (theme) => { try { localStorage.setItem("curvlab-theme", theme); } catch { /* private mode */ } };
  const label = () => { toggle.textContent = isDark() ? "Light theme" : "Dark theme"; };
  try {
    const stored = localStorage.getItem("curvlab-theme");
    if (stored === "light" || stored === "dark") root.dataset.theme = stored;
  } catch { /* private mode */ }
  toggle.hidden = false;
  label();
  prefersDark.addEventListener("change", label);
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    label();
  });

  const copyText = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // not a secure context: a page opened from a plain http server
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  document.querySelectorAll("button.copy").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await copyText(button.dataset.copy);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  });
})();
