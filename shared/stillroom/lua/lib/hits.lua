-- Keeps the hits of one subject against one limit: a sliding log of (last µs, count), packed 7 + 4 bytes, oldest first.
-- Hits in the same 1/24 of the window share an entry that carries the LAST of their times, so none is forgotten before
-- its window has passed: never more than the quota in any window. A window touches 25 slices where it begins in the
-- midst of one, and each has one entry: at most 25 (one more each time the clock steps back, until they have left).
-- A quota of up to 24 needs no sharing: its log is exact. The log knows neither quota nor window, so both may change
-- while it lives. Two limits may have one name and two windows: two plans, or a deploy that changes one. A
-- check with the shorter window keeps the hits that only the longer one counts: `keep` is the longest window of the
-- name, in µs as all times here.

local ENTRY, ONE = 11, '>I7I4'
local SLICES = 24
local MOST = 4294967295
local SLACK_MS = 1000 -- the key outlives its hits by this: the script decides, not the key's TTL
local floor = math.floor

local function format_of(entries)
  return entries == 1 and ONE or '>' .. string.rep('I7I4', entries)
end

-- Returns the life of a log's key: the longest window of its name, `keep`, and a little more. It is text,
-- made once, because to make text of a number costs as much as half a command.
local function life_of(keep)
  return plain(keep / 1000 + SLACK_MS)
end

local function keep_of(life)
  return (life - SLACK_MS) * 1000
end

-- Keeps hits that only the longer window counts. Many of them share entries by the longer window's slices.
local function coalesced(old, keep)
  if #old <= 2 * SLICES then
    return old
  end
  local slice, log = keep / SLICES, {}
  for i = 1, #old, 2 do
    local n = #log
    if n > 0 and floor(log[n - 1] / slice) == floor(old[i] / slice) then
      log[n - 1], log[n] = old[i], math.min(log[n] + old[i + 1], MOST)
    else
      log[n + 1], log[n + 2] = old[i], old[i + 1]
    end
  end
  return log
end

-- `old`, `raw`: what read_hits gave beside the log. `same`: how many entries at its front are as they were in `raw`.
-- A server that is full, and too old to know flags, refuses a script's first write if it takes memory, and only the
-- first: a PEXPIRE takes none.
local function save(key, log, life, old, raw, same)
  if old then
    local all = coalesced(old, keep_of(life))
    for _, part in ipairs(log) do
      all[#all + 1] = part
    end
    log, raw = all, nil
  end
  same = raw and same or 0
  local value = struct.pack(format_of(#log / 2 - same), unpack(log, 2 * same + 1))
  if same > 0 then
    value = string.sub(raw, 1, ENTRY * same) .. value
  end
  if redis.pcall('SET', key, value, 'PX', life).err then
    redis.call('PEXPIRE', key, life)
    redis.call('SET', key, value, 'PX', life)
  end
end

-- A clock that stepped back (a failover, NTP) must give nobody a fresh quota, and nobody an endless wait: hits that
-- are ahead of it are hits of now. The others stay where they are. A clock that was ahead for a moment says nothing
-- about them, and moved back with it they would leave their window early. Written at once, or each look would find
-- them at now again.
local function follow_clock(key, log, now, life)
  for i = #log - 1, 1, -2 do
    log[i] = math.min(log[i], now)
  end
  save(key, log, life)
end

-- Reads a log. `raw` is the content of its key; content of another shape was written by a stranger and is no log.
-- Returns the hits that count, how many they are, those that only a longer window counts, and the first as packed.
local function read_hits(key, raw, now, window, life)
  local size = raw and #raw / ENTRY or 0
  if size == 0 or size % 1 ~= 0 then
    return {}, 0
  end
  local log, last = {struct.unpack(format_of(size), raw)}, 2 * size
  log[last + 1] = nil -- where the next entry would begin
  if log[last - 1] > now then
    follow_clock(key, log, now, life)
    raw = nil
  end
  local first, used, old = 1, 0, nil
  while first < last and log[first] <= now - window do
    first = first + 2
  end
  if first > 1 then
    local forgotten, oldest = 1, now - keep_of(life)
    while forgotten < first and log[forgotten] <= oldest do
      forgotten = forgotten + 2
    end
    old = forgotten < first and {unpack(log, forgotten, first - 1)} or nil
    log, raw = {unpack(log, first, last)}, raw and string.sub(raw, (first - 1) / 2 * ENTRY + 1)
  end
  for i = 2, #log, 2 do
    used = used + log[i]
  end
  return log, used, old, raw
end

-- Returns how many entries before it are as they were.
local function put_hits(log, at, count, quota, window)
  local place, slice = #log + 1, window / SLICES
  while place > 1 and log[place - 2] > at do
    place = place - 2
  end
  local before, after = log[place - 2], log[place]
  if quota > SLICES and before and floor(before / slice) == floor(at / slice) then
    place = place - 2
    log[place], log[place + 1] = at, math.min(log[place + 1] + count, MOST)
  elseif not after then
    log[place], log[place + 1] = at, math.min(count, MOST)
  elseif quota > SLICES and floor(after / slice) == floor(at / slice) then -- a charge that arrives after a later hit
    log[place + 1] = math.min(log[place + 1] + count, MOST)
  else
    table.insert(log, place, at)
    table.insert(log, place + 1, math.min(count, MOST))
  end
  return (place - 1) / 2
end

-- Returns µs until some hits come back, and until all have come back: 0 where there are none.
local function comes_back(log, now, window)
  local n = #log
  if n == 0 then
    return 0, 0
  end
  return log[1] + window - now, log[n - 1] + window - now
end
