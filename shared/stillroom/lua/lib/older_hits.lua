-- Packs the hits that only the longer window of a limit's name counts. Many of them share entries by the longer
-- window's slices. See hits.

local function pack_older(old, life)
  local log, slice = old, (life - SLACK_MS) * 1000 / SLICES
  if #old > 2 * SLICES then
    log = {}
    for i = 1, #old, 2 do
      local n = #log
      if n > 0 and math.floor(log[n - 1] / slice) == math.floor(old[i] / slice) then
        log[n - 1], log[n] = old[i], math.min(log[n] + old[i + 1], MOST)
      else
        log[n + 1], log[n + 2] = old[i], old[i + 1]
      end
    end
  end
  return struct.pack('>' .. string.rep(EACH, #log / 2), unpack(log))
end
