// The page's own script: themes, charts in the colours of the theme, selection, printing. No network.
(() => {
  "use strict"
  const root = document.documentElement

  // Charts name the colours they wear in tags such as "fill_color=after"; the style sheet knows what these look like.
  function paintCharts() {
    if (!window.Bokeh) return
    const style = getComputedStyle(root)
    for (const document of window.Bokeh.documents) {
      for (const model of document._all_models.values()) {
        for (const tag of model.tags || []) {
          const [property, token] = String(tag).split("=")
          const colour = style.getPropertyValue(`--${token}`).trim()
          if (!colour) continue
          const known = model[property]
          model[property] = known && typeof known === "object" && "value" in known ? {value: colour} : colour
        }
      }
    }
  }

  function setTheme(theme) {
    root.dataset.theme = theme
    paintCharts()
    document.dispatchEvent(new Event("graphopt-theme"))
  }

  function remember(theme) {
    try { localStorage.setItem("graphopt-theme", theme) } catch { /* a page opened from a file may have no storage */ }
  }

  document.getElementById("theme").addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark"
    setTheme(theme)
    remember(theme)
  })

  // Paper is white; what is folded away stays so.
  let themeOnScreen = null
  window.addEventListener("beforeprint", () => {
    themeOnScreen ??= root.dataset.theme
    setTheme("light")
  })
  window.addEventListener("afterprint", () => {
    if (themeOnScreen !== null) setTheme(themeOnScreen)
    themeOnScreen = null
  })

  window.graphoptSelect = (origin) => {
    const graph = document.getElementById("graph")
    graph.scrollIntoView({behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"})
    document.dispatchEvent(new CustomEvent("graphopt-select", {detail: {origin}}))
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-origin]")
    if (link) window.graphoptSelect(link.dataset.origin)
  })

  const copy = document.getElementById("copy")
  if (copy) {
    copy.addEventListener("click", async () => {
      const code = copy.parentElement.querySelector("code")
      try {
        await navigator.clipboard.writeText(code.textContent)
        copy.textContent = "Copied"
      } catch {
        getSelection().selectAllChildren(code)
        copy.textContent = "Selected"
      }
      setTimeout(() => { copy.textContent = "Copy" }, 1500)
    })
  }

  // The section one is in, marked in the bar at the top.
  const links = new Map([...document.querySelectorAll("header nav a")].map((a) => [a.hash.slice(1), a]))
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const link = links.get(entry.target.id)
      if (link && entry.isIntersecting) {
        for (const other of links.values()) other.removeAttribute("aria-current")
        link.setAttribute("aria-current", "true")
      } else if (link) {
        link.removeAttribute("aria-current")
      }
    }
  }, {rootMargin: "-20% 0px -70% 0px"})
  for (const id of links.keys()) seen.observe(document.getElementById(id))

  paintCharts()
  if (window.Bokeh) {
    // Charts are made a moment after the page is parsed.
    const drawn = setInterval(() => {
      if (window.Bokeh.documents.length) {
        clearInterval(drawn)
        paintCharts()
      }
    }, 20)
    setTimeout(() => clearInterval(drawn), 10000)
  }
})()
