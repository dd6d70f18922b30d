// The plots of a report with values at the cursor, zoom, smoothing and logarithmic axes. They are drawn on canvases that
// replace the static plots. Without scripts, or if the browser can't inflate the data, the static plots stay.
"use strict"

const DASHES = { solid: [], dashed: [6, 3], dotted: [1.5, 2.5] }
const UNITS = [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]]
const MARGIN = { left: 62, right: 12, top: 10, bottom: 42 }

// ---- numbers -------------------------------------------------------------------------------------------------------

const short = value => {
  const [unit, size] = UNITS.find(([, size]) => Math.abs(value) >= size) ?? ["", 1]
  return Number((value / size).toPrecision(6)) + unit
}
const digits = value => (Math.abs(value) < 1e5 ? String(Number(value.toPrecision(5))) : Math.round(value).toLocaleString("en"))

// Return the ticks between two values, in steps of 1, 2, 2.5 or 5 times a power of ten.
function linearTicks(low, high, most) {
  const power = 10 ** Math.floor(Math.log10((high - low) / most))
  const step = power * [1, 2, 2.5, 5, 10].find(factor => (high - low) / (factor * power) <= most)
  const first = Math.ceil(low / step)
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, k) => (first + k) * step)
}

// Return powers of ten, also twice and five times each below a factor of 1000, or linear ticks below a factor of 8.
function logTicks(low, high, most) {
  if (high / low < 8) return linearTicks(low, high, most)
  const ticks = []
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of high / low > 1e3 ? [1] : [1, 2, 5]) ticks.push(factor * 10 ** power)
  const inside = ticks.filter(tick => tick >= low && tick <= high)
  const every = Math.ceil(inside.length / (most + 3))
  return inside.filter((_, k) => k % every === 0)
}

// TensorBoard's exponential smoothing. A running mean that starts at 0 is too low: after n values its weights add up to
// 1 - weight^n, by which it is divided.
function smoothed(values, weight) {
  let mean = 0
  return values.map((value, n) => {
    mean = mean * weight + value * (1 - weight)
    return mean / (1 - weight ** (n + 1))
  })
}

// Return the number of values below x in a rising column.
function countBelow(column, x) {
  let low = 0, high = column.length
  while (low < high) {
    const middle = (low + high) >> 1
    if (column[middle] < x) low = middle + 1
    else high = middle
  }
  return low
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0))
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))
  const data = await new Response(stream).json()
  for (const run of data.runs)
    for (const series of Object.values(run.series))
      for (const [name, { places, differences }] of Object.entries(series))
        if (name !== "y") {
          let sum = 0
          series[name] = differences.map(difference => (sum += difference) / 10 ** places)
        }
  return data
}

// ---- the reader's choices, kept when the page reloads ----------------------------------------------------------------

const KEY = `report ${location.pathname}`
const chosen = { smoothing: 0, off: [], plots: {} }
try {
  Object.assign(chosen, JSON.parse(sessionStorage.getItem(KEY)))
} catch { /* without storage, choices are lost */ }
function keep() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(chosen))
  } catch { /* as above */ }
}
