-- The hits of one subject against one limit: a sliding log of (last µs, count), packed 7 + 4 bytes, oldest first.
-- Hits in the same 1/24 of the window share an entry that carries the LAST of their times, so none is forgotten before
-- its window has passed: never more than the quota in any window, and at most 26 entries. A quota of up to 24 needs no
-- sharing: its log is exact. The log knows neither quota nor window, so both may change while it lives.

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

local function life(window)
  return plain(window / 1000 + SLACK_MS)
end

-- A server that is full, and too old to know flags, refuses a script's first write if it takes memory, and only the
-- first: a PEXPIRE takes none.
local function save(key, log, window)
  local value, ms = packed(log), life(window)
  if redis.pcall('SET', key, value, 'PX', ms).err then
    redis.call('PEXPIRE', key, ms)
    redis.call('SET', key, value, 'PX', ms)
  end
end

-- A clock that stepped back (a failover, NTP) must give nobody a fresh quota, and nobody an endless wait: the
-- log moves along, so that its newest hit is now. Written at once, or each look would find it at now again.
local function follow_clock(key, log, now, window)
  local ahead = #log > 0 and log[#log - 1] - now or 0
  if ahead > 0 then
    for i = 1, #log, 2 do
      log[i] = log[i] - ahead
    end
    save(key, log, window)
  end
end

-- `raw`: what a log's key holds. → the hits that still count, how many they are
local function read_hits(key, raw, now, window)
  local all = unpacked(raw)
  follow_clock(key, all, now, window)
  local oldest, used, log = now - window, 0, {}
  for i = 1, #all, 2 do
    if all[i] > oldest then
      log[#log + 1] = all[i]
      log[#log + 1] = all[i + 1]
      used = used + all[i + 1]
    end
  end
  return log, used
end

local function put_hits(log, at, count, quota, window)
  local place = #log + 1
  while place > 1 and log[place - 2] > at do
    place = place - 2
  end
  local slice = window / SLICES
  if quota > SLICES and place > 1 and math.floor(log[place - 2] / slice) == math.floor(at / slice) then
    log[place - 2] = at
    log[place - 1] = math.min(log[place - 1] + count, MOST)
  else
    table.insert(log, place, at)
    table.insert(log, place + 1, math.min(count, MOST))
  end
end
