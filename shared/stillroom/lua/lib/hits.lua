-- The hits of one subject against one limit: a sliding log of (last µs, count), packed 7 + 4 bytes, oldest first.
-- Hits in the same 1/24 of the window share an entry that carries the LAST of their times, so none is forgotten before
-- its window has passed: never more than the quota in any window. A window touches 25 slices where it begins in the
-- midst of one, and each has one entry: at most 25 (one more each time the clock steps back, until they have left).
-- A quota of up to 24 needs no sharing: its log is exact. The log knows neither quota nor window, so both may change
-- while it lives. Two limits may have one name and two windows: two plans, or a deploy that changes one. What the
-- shorter one does not count it does not drop: `keep` is the longest window of the name, in µs as all times here.

local ENTRY, FORMAT = 11, 'I7I4'
local SLICES = 24
local MOST = 4294967295
local SLACK_MS = 1000 -- the key outlives its hits by this: the script decides, not the key's TTL

-- What is not a log of ours is none: it was written by somebody else.
local function unpacked(raw)
  if not raw or #raw == 0 or #raw % ENTRY ~= 0 then
    return {}
  end
  local log = {struct.unpack('>' .. string.rep(FORMAT, #raw / ENTRY), raw)}
  log[#log] = nil -- where the next entry would begin
  return log
end

local function packed(log)
  return struct.pack('>' .. string.rep(FORMAT, #log / 2), unpack(log))
end

-- A server that is full, and too old to know flags, refuses a script's first write if it takes memory, and only the
-- first: a PEXPIRE takes none.
local function write(key, log, keep)
  local value, ms = packed(log), plain(keep / 1000 + SLACK_MS)
  if redis.pcall('SET', key, value, 'PX', ms).err then
    redis.call('PEXPIRE', key, ms)
    redis.call('SET', key, value, 'PX', ms)
  end
end

-- Hits that only the longer window counts. If they are many they share entries: of its slices, not of the shorter one's.
local function coalesced(old, keep)
  if #old <= 2 * SLICES then
    return old
  end
  local slice, log = keep / SLICES, {}
  for i = 1, #old, 2 do
    local n = #log
    if n > 0 and math.floor(log[n - 1] / slice) == math.floor(old[i] / slice) then
      log[n - 1], log[n] = old[i], math.min(log[n] + old[i + 1], MOST)
    else
      log[n + 1], log[n + 2] = old[i], old[i + 1]
    end
  end
  return log
end

-- `old`: what read_hits gave beside the log, if there was any.
local function save(key, log, keep, old)
  if old then
    local all = coalesced(old, keep)
    for _, part in ipairs(log) do
      all[#all + 1] = part
    end
    log = all
  end
  write(key, log, keep)
end

-- A clock that stepped back (a failover, NTP) must give nobody a fresh quota, and nobody an endless wait: the
-- log moves along, so that its newest hit is now. Written at once, or each look would find it at now again.
local function follow_clock(key, log, now, keep)
  local ahead = #log > 0 and log[#log - 1] - now or 0
  if ahead > 0 then
    for i = 1, #log, 2 do
      log[i] = log[i] - ahead
    end
    write(key, log, keep)
  end
end

-- `raw`: what a log's key holds. → the hits that count, how many they are, and those that only a longer window counts
local function read_hits(key, raw, now, window, keep)
  local all = unpacked(raw)
  follow_clock(key, all, now, keep)
  local oldest, used, log, old = now - window, 0, {}, nil
  for i = 1, #all, 2 do
    if all[i] > oldest then
      log[#log + 1] = all[i]
      log[#log + 1] = all[i + 1]
      used = used + all[i + 1]
    elseif all[i] > now - keep then
      old = old or {}
      old[#old + 1] = all[i]
      old[#old + 1] = all[i + 1]
    end
  end
  return log, used, old
end

local function in_one_slice(one, other, window)
  local slice = window / SLICES
  return one and other and math.floor(one / slice) == math.floor(other / slice)
end

local function put_hits(log, at, count, quota, window)
  local place = #log + 1
  while place > 1 and log[place - 2] > at do
    place = place - 2
  end
  if quota > SLICES and in_one_slice(log[place - 2], at, window) then
    log[place - 2] = at
    log[place - 1] = math.min(log[place - 1] + count, MOST)
  elseif quota > SLICES and in_one_slice(at, log[place], window) then -- a charge, told of after a later hit
    log[place + 1] = math.min(log[place + 1] + count, MOST)
  else
    table.insert(log, place, at)
    table.insert(log, place + 1, math.min(count, MOST))
  end
end

-- → µs until some hits come back, and until all have: 0 where there are none
local function comes_back(log, now, window)
  local n = #log
  if n == 0 then
    return 0, 0
  end
  return log[1] + window - now, log[n - 1] + window - now
end
