// ---- one plot ------------------------------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties)
  made.append(...children)
  return made
}
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name)

class Plot {
  constructor(spec, runs, figure, page) {
    this.spec = spec
    this.page = page
    this.chosen = chosen.plots[spec.name] ??= { log: { x: false, y: spec.log }, zoom: {} }
    this.curves = spec.curves.map(curve => {
      const { y, [spec.x]: x } = runs[curve.run].series[curve.key]
      return { ...runs[curve.run], ...curve, x, y: curve.scale === 1 ? y : y.map(value => value * curve.scale) }
    })
    const still = figure.querySelector("svg")
    this.base = element("canvas")
    this.top = element("canvas", { tabIndex: 0, role: "img", ariaLabel: still.querySelector("title").textContent })
    this.box = element("div", { className: "plot live", id: still.id }, this.base, this.top)
    still.replaceWith(this.box)
    figure.querySelector("figcaption").prepend(this.tools())
    this.listen()
    new ResizeObserver(() => this.draw()).observe(this.box)
  }

  tools() {
    this.reset = element("button", { type: "button", textContent: "reset zoom", onclick: () => this.zoom({}) })
    const buttons = ["x", "y"].map(side => {
      const positive = this.curves.every(curve => curve[side].every(value => value > 0))
      const button = element("button", { type: "button", textContent: `log ${side}`, disabled: !positive })
      button.ariaPressed = this.chosen.log[side] &&= positive
      button.onclick = () => {
        button.ariaPressed = this.chosen.log[side] = !this.chosen.log[side]
        this.zoom({ ...this.chosen.zoom, [side]: undefined })
      }
      return button
    })
    return element("span", { className: "tools" }, this.reset, ...buttons)
  }

  zoom(range) {
    this.chosen.zoom = range
    keep()
    this.draw()
  }

  get visible() {
    return this.curves.filter(curve => !chosen.off.includes(this.page.groups[curve.group]))
  }

  // Return the lowest and the highest value of an axis: the reader's zoom, or all drawn values with a margin.
  range(side) {
    const { zoom, log } = this.chosen
    if (zoom[side]) return zoom[side]
    const [from, to] = (side === "y" && zoom.x) || [-Infinity, Infinity]
    let low = Infinity, high = -Infinity
    const add = value => {
      if (log[side] && value <= 0) return
      low = Math.min(low, value)
      high = Math.max(high, value)
    }
    for (const { x, [side]: values } of this.visible) values.forEach((value, n) => x[n] >= from && x[n] <= to && add(value))
    if (side === "y" && this.spec.threshold !== null) add(this.spec.threshold)
    if (side === "y" && this.spec.from_zero) add(0)
    if (low > high) [low, high] = [1, 10]
    if (low === high) return low > 0 ? [low / 2, low * 2] : [low - 1, low + 1]
    const share = side === "y" ? 0.05 : 0.02
    if (log[side]) return [low / (high / low) ** share, high * (high / low) ** share]
    return [low === 0 ? 0 : low - share * (high - low), high + share * (high - low)]
  }

  // Convert a value to pixels, and back. An axis is {low, high, log, start, length}, with a negative length for y.
  pixel(side, value) {
    const { low, high, log, start, length } = this.axes[side]
    return start + length * (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low))
  }

  value(side, pixel) {
    const { low, high, log, start, length } = this.axes[side]
    const share = (pixel - start) / length
    return log ? low * (high / low) ** share : low + share * (high - low)
  }

  canvas(canvas) {
    const scale = devicePixelRatio || 1
    canvas.width = Math.round(this.width * scale)
    canvas.height = Math.round(this.height * scale)
    const context = canvas.getContext("2d")
    context.scale(scale, scale)
    context.font = "11px system-ui, sans-serif"
    context.lineJoin = "round"
    return context
  }

  draw() {
    this.width = this.box.clientWidth
    this.height = this.box.clientHeight
    const { left, right, top, bottom } = MARGIN
    const length = { x: this.width - left - right, y: -(this.height - top - bottom) }
    const start = { x: left, y: this.height - bottom }
    this.axes = {}
    for (const side of ["x", "y"]) {
      const [low, high] = this.range(side)
      this.axes[side] = { low, high, log: this.chosen.log[side], start: start[side], length: length[side] }
    }
    this.reset.hidden = !this.chosen.zoom.x && !this.chosen.zoom.y
    const context = this.canvas(this.base)
    this.overlay = this.canvas(this.top)
    this.drawAxes(context)
    context.beginPath()
    context.rect(left, top, length.x, -length.y)
    context.clip()
    this.drawLevels(context)
    for (const curve of this.visible) this.drawCurve(context, curve)
  }

  drawAxes(context) {
    const { x, y } = this.axes
    const [right, top] = [x.start + x.length, y.start + y.length]
    context.strokeStyle = colour("--line")
    context.fillStyle = colour("--ink")
    for (const side of ["x", "y"]) {
      const { low, high, log } = this.axes[side]
      const ticks = (log ? logTicks : linearTicks)(low, high, side === "x" ? Math.max(3, Math.floor(x.length / 55)) : 6)
      for (const tick of ticks) {
        const at = Math.round(this.pixel(side, tick)) + 0.5
        context.beginPath()
        if (side === "x") context.moveTo(at, top), context.lineTo(at, y.start)
        else context.moveTo(x.start, at), context.lineTo(right, at)
        context.stroke()
        context.textAlign = side === "x" ? "center" : "right"
        context.textBaseline = side === "x" ? "top" : "middle"
        context.fillText(short(tick), side === "x" ? at : x.start - 6, side === "x" ? y.start + 6 : at)
      }
    }
    context.textAlign = "center"
    context.textBaseline = "alphabetic"
    context.fillText(this.spec.x_label, x.start + x.length / 2, this.height - 8)
    context.save()
    context.rotate(-Math.PI / 2)
    context.fillText(this.spec.y_label, -(y.start + y.length / 2), 12)
    context.restore()
  }

  // Draw the threshold, the marks of rollbacks and, if the curves are not the legend's runs, their names.
  drawLevels(context) {
    const { x, y } = this.axes
    const line = (points, stroke, dashes) => {
      context.strokeStyle = stroke
      context.setLineDash(dashes)
      context.beginPath()
      context.moveTo(...points[0])
      context.lineTo(...points[1])
      context.stroke()
    }
    if (this.spec.threshold !== null) {
      const at = this.pixel("y", this.spec.threshold)
      line([[x.start, at], [x.start + x.length, at]], colour("--quiet"), DASHES.dashed)
    }
    for (const curve of this.visible)
      for (const step of curve.marks) {
        const at = this.pixel("x", step)
        line([[at, y.start], [at, y.start + y.length]], curve.colour, DASHES.dotted)
      }
    context.textAlign = "right"
    this.curves.filter(curve => curve.label !== curve.name).forEach((curve, n) => {
      context.fillStyle = this.inkOf(curve)
      context.fillText(curve.label, x.start + x.length - 4, MARGIN.top + 12 + 14 * n)
    })
  }

  inkOf(curve) {
    return curve.second ? colour("--ink") : curve.colour
  }

  drawCurve(context, curve) {
    const weight = this.spec.steps ? 0 : chosen.smoothing
    if (curve.weight !== weight) Object.assign(curve, { weight, line: weight ? smoothed(curve.y, weight) : curve.y })
    context.strokeStyle = context.fillStyle = this.inkOf(curve)
    context.setLineDash(DASHES[curve.dashes])
    // Browsers without a GPU draw lines of one pixel 30 times as fast as wider ones, and wider ones 2 to 7 times as fast in
    // pieces of 20 points as at once (24 runs x 1000 points of noise: 43 ms, 1440 ms, 196 ms).
    context.lineWidth = devicePixelRatio > 1 ? 1.3 : 1
    const trace = values => {
      context.beginPath()
      curve.x.forEach((x, n) => {
        const [across, up] = [this.pixel("x", x), this.pixel("y", values[n])]
        // A value holds from the previous step on: the line rises there, then runs across.
        if (this.spec.steps && n) context.lineTo(this.pixel("x", curve.x[n - 1]), up)
        context.lineTo(across, up)
        if (n % 20) return
        context.stroke()
        context.beginPath()
        context.moveTo(across, up)
      })
      context.stroke()
      if (values.length === 1) context.fillRect(this.pixel("x", curve.x[0]) - 3, this.pixel("y", values[0]) - 3, 6, 6)
    }
    if (weight) {
      context.globalAlpha = 0.22
      trace(curve.y)
    }
    context.globalAlpha = 1
    trace(curve.line)
  }

  // Return the point of every curve nearest to x, without curves that end more than 12 pixels from it.
  readings(x) {
    const at = this.pixel("x", x)
    return this.visible.flatMap(curve => {
      let n = countBelow(curve.x, x)
      if (n === curve.x.length || (n && !this.spec.steps && this.pixel("x", curve.x[n]) - at > at - this.pixel("x", curve.x[n - 1]))) n--
      const [across, up] = [this.pixel("x", curve.x[n]), this.pixel("y", curve.line[n])]
      const outside = (n === 0 || n === curve.x.length - 1) && (n === 0 ? across - at : at - across) > 12
      return outside ? [] : [{ curve, across, up, x: curve.x[n], y: curve.y[n], smooth: curve.line[n] }]
    })
  }

  // Draw the cursor at x with a dot on each curve; return the readings.
  point(x) {
    const { start, length } = this.axes.y
    const at = this.pixel("x", x)
    this.overlay.clearRect(0, 0, this.width, this.height)
    if (at < this.axes.x.start || at > this.axes.x.start + this.axes.x.length) return []
    this.overlay.strokeStyle = colour("--quiet")
    this.overlay.strokeRect(at, start + length, 0, -length)
    const found = this.readings(x)
    for (const { curve, across, up } of found) {
      this.overlay.fillStyle = this.inkOf(curve)
      if (up <= start && up >= start + length) this.overlay.fillRect(across - 2.5, up - 2.5, 5, 5)
    }
    return found
  }

  leave() {
    this.overlay.clearRect(0, 0, this.width, this.height)
  }

  listen() {
    const within = (side, pixel) => {
      const { start, length } = this.axes[side]
      return Math.min(Math.max(pixel, Math.min(start, start + length)), Math.max(start, start + length))
    }
    const place = event => ({ x: within("x", event.offsetX), y: within("y", event.offsetY) })
    let from = null
    this.top.onpointerdown = event => {
      if (event.pointerType === "mouse" && event.button === 0) {
        from = place(event)
        this.top.setPointerCapture(event.pointerId)
      } else this.page.point(this, place(event), event)
    }
    this.top.onpointermove = event => {
      const to = place(event)
      this.page.point(this, to, event, from && [from.x, from.y, to.x - from.x, to.y - from.y])
    }
    this.top.onpointerup = event => {
      if (!from) return
      const to = place(event)
      const wide = Math.abs(to.x - from.x), high = Math.abs(to.y - from.y)
      const between = side => [from[side], to[side]].map(pixel => this.value(side, pixel)).sort((a, b) => a - b)
      // A flat box zooms only x and a narrow one only y. A click does not zoom.
      const range = { ...this.chosen.zoom }
      if (wide > 12) range.x = between("x")
      if (high > 12) range.y = between("y")
      else if (wide > 12) range.y = undefined
      from = null
      if (wide > 12 || high > 12) this.zoom(range)
    }
    this.top.onpointercancel = () => { from = null }
    this.top.onpointerleave = event => event.pointerType === "mouse" && this.page.leave()
    this.top.ondblclick = () => this.zoom({})
    this.top.onkeydown = event => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
      if (event.key === "Escape") this.zoom({})
      if (!move) return
      event.preventDefault()
      const { start, length } = this.axes.x
      this.key = within("x", (this.key ?? start) + (move * length) / 100)
      const box = this.top.getBoundingClientRect()
      this.page.point(this, { x: this.key, y: MARGIN.top }, { clientX: box.left + this.key, clientY: box.top })
    }
  }
}
