-- Keeps the first snapshot of a minute, and remembers the open findings, so that one worker logs each of them. What
-- the webhook is to tell of them is noted here, too: it is neither lost nor doubled, whenever the worker or its
-- connection dies.
-- KEYS  1 health  2 health:week  3 health:open  4 webhook
-- ARGV  1 snapshot, JSON  2 most in health  3 most in health:week  4 how long all keys are kept, s
--       5 most in webhook; 0: there is none  6… of each finding: its name, and the event that it begins, JSON
-- returns {1, {findings that began}, {finding that ended, for how long it was open, ms, …}}
--         {0, {}, {}}: this minute has a snapshot already
-- flags: allow-oom
-- include: time

local now_ms = math.floor(now_us() / 1000)
local keep = tonumber(ARGV[4])
local DROPPED = 100 -- snapshots from the future at a time: a step of the clock leaves few, and it drops the rest later

local function newest(stream)
  local entry = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
  return entry and tonumber(string.match(entry[1], '^%d+')) or 0
end

-- Drops snapshots that were kept while the clock stood ahead. A stream takes no id below its last one, so its last id
-- goes with them: else nothing would be kept until the clock has caught up.
local function drop_future(stream, slot_ms)
  local future = redis.call('XREVRANGE', stream, '+', plain(now_ms + slot_ms), 'COUNT', DROPPED)
  for _, entry in ipairs(future) do
    redis.call('XDEL', stream, entry[1])
  end
  if #future > 0 then
    redis.call('XSETID', stream, plain(newest(stream)) .. '-0')
  end
end

-- The id is the slot of time, so a second beat, or a clock that stepped back within it, adds nothing.
local function keep_in(stream, most, slot_ms)
  local slot = now_ms - now_ms % slot_ms
  if newest(stream) >= now_ms + slot_ms then
    drop_future(stream, slot_ms)
  end
  if newest(stream) >= slot then
    return false
  end
  redis.call('XADD', stream, 'MAXLEN', most, plain(slot) .. '-0', 'snapshot', ARGV[1])
  redis.call('EXPIRE', stream, keep)
  return true
end

local function note(event)
  if ARGV[5] ~= '0' then
    redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5], '*', 'event', event)
    redis.call('EXPIRE', KEYS[4], keep)
  end
end

redis.call('EXPIRE', KEYS[1], keep) -- the first write takes no memory: see lib/hits
if not keep_in(KEYS[1], ARGV[2], 60000) then
  return {0, {}, {}}
end
keep_in(KEYS[2], ARGV[3], 300000)

local began, ended, found = {}, {}, {}
for n = 6, #ARGV, 2 do
  found[ARGV[n]] = true
  if redis.call('HSETNX', KEYS[3], ARGV[n], plain(now_ms)) == 1 then
    began[#began + 1] = ARGV[n]
    note(ARGV[n + 1])
  end
end
local open = redis.call('HGETALL', KEYS[3])
for n = 1, #open, 2 do
  local since = tonumber(open[n + 1]) or now_ms
  if not found[open[n]] then
    local lasted_ms = math.max(0, now_ms - since)
    redis.call('HDEL', KEYS[3], open[n])
    ended[#ended + 1] = open[n]
    ended[#ended + 1] = plain(lasted_ms)
    note(cjson.encode({kind = 'finding over', name = open[n], lasted_s = lasted_ms / 1000}))
  elseif since > now_ms then
    redis.call('HSET', KEYS[3], open[n], plain(now_ms))
  end
end
redis.call('EXPIRE', KEYS[3], keep)
return {1, began, ended}
