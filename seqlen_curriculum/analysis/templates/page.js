// ---- the page ------------------------------------------------------------------------------------------------------

class Page {
  constructor(data) {
    const items = [...document.querySelectorAll(".legend li")]
    this.groups = items.map(item => item.textContent.trim())
    this.tip = element("div", { className: "tip", hidden: true, ariaLive: "polite" })
    document.body.append(this.tip)
    this.plots = data.plots.map(spec => new Plot(spec, data.runs, document.getElementById(`plot-${spec.name}`).parentElement, this))
    this.switches = items.map((item, n) => this.legendSwitch(item, this.groups[n]))
    this.smoothing()
    matchMedia("(prefers-color-scheme: dark)").onchange = () => this.draw()
    document.addEventListener("pointerdown", event => event.target.closest(".live, .tip") ?? this.leave())
  }

  draw() {
    this.switches.forEach((button, n) => { button.ariaPressed = !chosen.off.includes(this.groups[n]) })
    this.plots.forEach(plot => plot.draw())
    keep()
  }

  legendSwitch(item, group) {
    const button = element("button", { type: "button", title: "click to hide or show; double click to show only this run, or all" })
    button.append(...item.childNodes)
    item.append(button)
    button.ariaPressed = !chosen.off.includes(group)
    button.onclick = () => {
      chosen.off = chosen.off.includes(group) ? chosen.off.filter(other => other !== group) : [...chosen.off, group]
      this.draw()
    }
    button.ondblclick = () => {
      const others = this.groups.filter(other => other !== group)
      chosen.off = others.every(other => chosen.off.includes(other)) ? [] : others
      this.draw()
    }
    return button
  }

  smoothing() {
    const controls = document.querySelector(".controls")
    const [slider, output] = [controls.querySelector("input"), controls.querySelector("output")]
    slider.value = output.value = chosen.smoothing
    slider.oninput = () => {
      chosen.smoothing = output.value = Number(slider.value)
      cancelAnimationFrame(this.frame)
      this.frame = requestAnimationFrame(() => this.draw())
    }
    controls.hidden = false
  }

  // Show the values at a point of a plot, once per frame, and the cursor in all plots with the same x axis.
  point(plot, place, event, box = null) {
    cancelAnimationFrame(this.frame)
    this.frame = requestAnimationFrame(() => {
      const x = plot.value("x", place.x)
      let found = []
      for (const other of this.plots)
        if (other.spec.x !== plot.spec.x) other.leave()
        else if (other === plot) found = other.point(x)
        else other.point(x)
      if (box) plot.overlay.strokeRect(...box)
      this.show(plot, found, place, event)
    })
  }

  show(plot, found, place, event) {
    const nearest = found.reduce((best, one) => (Math.abs(one.up - place.y) < Math.abs((best?.up ?? Infinity) - place.y) ? one : best), null)
    const rows = found.sort((a, b) => b.smooth - a.smooth).map(one => {
      const line = element("span", { className: "line" })
      line.style.borderTop = `3px ${one.curve.dashes} ${plot.inkOf(one.curve)}`
      const values = plot.spec.steps || !chosen.smoothing ? [one.y] : [one.smooth, one.y]
      const cells = [...values.map(digits), digits(one.x)].map(text => element("td", {}, text))
      return element("tr", { className: one === nearest ? "nearest" : "" }, element("th", {}, line, one.curve.label), ...cells)
    })
    const titles = plot.spec.steps || !chosen.smoothing ? ["value"] : ["smoothed", "value"]
    const head = element("tr", {}, ...["", ...titles, plot.spec.x === "hours" ? "time" : plot.spec.x].map(title => element("th", {}, title)))
    this.tip.replaceChildren(element("table", {}, head, ...rows))
    this.tip.hidden = !rows.length
    // On a touch screen the values are shown on the other half of the screen, away from the finger.
    this.tip.className = event.pointerType !== "touch" ? "tip" : event.clientY > innerHeight / 2 ? "tip above" : "tip below"
    // Place the values beside the cursor, on the side with room, and within the window.
    const { offsetWidth: width, offsetHeight: height } = this.tip
    const left = event.clientX + 18 + width < innerWidth ? event.clientX + 18 : event.clientX - 18 - width
    this.tip.style.left = `${Math.max(4, left)}px`
    this.tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - height - 4))}px`
  }

  leave() {
    cancelAnimationFrame(this.frame)
    this.tip.hidden = true
    this.plots.forEach(plot => plot.leave())
  }
}

if ("DecompressionStream" in window)
  unpack(document.getElementById("curves").textContent).then(data => { window.report = new Page(data) })
