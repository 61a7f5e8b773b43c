-- Keeps the hits of one subject against one limit: a sliding log of (last µs, count), packed 7 + 4 bytes, oldest first.
-- Hits in the same 1/24 of the window share an entry that carries the LAST of their times, so none is forgotten before
-- its window has passed: never more than the quota in any window. A window touches 25 slices where it begins in the
-- midst of one, and each has one entry: at most 25 (one more each time the clock steps back, until they have left).
-- A quota of up to 24 needs no sharing: its log is exact, up to 48 entries (see put_hits). The log knows neither quota
-- nor window, so both may change while it lives. Two limits may have one name and two windows: two plans, or a deploy
-- that changes one. A check with the shorter window keeps the hits that only the longer one counts. `life`: how long a
-- log is kept, ms: the longest window of its name, and SLACK_MS.
-- Redis makes the functions of a script anew each time it runs. So what each check runs is in two functions, and what few
-- scripts need is in late_hits and older_hits.

local ENTRY, ONE, EACH = 11, '>I7I4', 'I7I4'
local SLICES = 24
local MOST = 4294967295
local LONGEST = 1000 -- entries: more than any log has, and as few as Lua can unpack
local SLACK_MS = 1000 -- the key outlives its hits by this: the script decides, not the key's TTL

-- Reads a log from the content of its key; content of another shape was written by a stranger and is no log.
-- Returns the hits that count, how many they are, the hits as they are packed, and those that only a longer window counts.
local function read_hits(key, packed, now, window, life)
  local size = packed and #packed / ENTRY or 0
  if size == 0 or size % 1 ~= 0 or size > LONGEST then
    return {}, 0, ''
  end
  local form, last = size == 1 and ONE or '>' .. string.rep(EACH, size), 2 * size
  local log = {struct.unpack(form, packed)}
  log[last + 1] = nil -- where the next entry would begin
  -- A clock that stepped back (a failover, NTP) must give nobody a fresh quota, and nobody an endless wait: hits that
  -- are ahead of it are hits of now. The others stay where they are. A clock that was ahead for a moment says nothing
  -- about them, and moved back with it they would leave their window early. Written at once, or each look would find
  -- them at now again.
  if log[last - 1] > now then
    for i = last - 1, 1, -2 do
      log[i] = math.min(log[i], now)
    end
    packed = struct.pack(form, unpack(log))
    redis.call('SET', key, packed, 'PX', life)
  end
  local first, used, old = 1, 0, nil
  while first < last and log[first] <= now - window do
    first = first + 2
  end
  if first > 1 then
    local forgotten, oldest = 1, now - (life - SLACK_MS) * 1000
    while forgotten < first and log[forgotten] <= oldest do
      forgotten = forgotten + 2
    end
    old = forgotten < first and {unpack(log, forgotten, first - 1)} or nil
    log, packed = {unpack(log, first, last)}, string.sub(packed, (first - 1) / 2 * ENTRY + 1)
  end
  for i = 2, #log, 2 do
    used = used + log[i]
  end
  return log, used, packed, old
end
