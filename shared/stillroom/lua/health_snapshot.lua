-- Keeps a snapshot, the first of its minute, and remembers which findings are open: one worker tells each of them.
-- KEYS  1 health  2 health:week  3 health:open
-- ARGV  1 snapshot, JSON  2 most in health  3 most in health:week  4 s to keep them all  5… findings
-- returns {1, {findings that began}, {finding that ended, since when, ms, …}}, or {0, {}, {}}: this minute has one
-- flags: allow-oom

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local keep = tonumber(ARGV[4])

local function newest(stream)
  local entry = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
  return entry and tonumber(string.match(entry[1], '^%d+')) or 0
end

-- The id is the slot of time, so a second beat, or a clock that stepped back, adds nothing.
local function keep_in(stream, most, slot_ms)
  local slot = now_ms - now_ms % slot_ms
  if newest(stream) >= slot then
    return false
  end
  redis.call('XADD', stream, 'MAXLEN', most, string.format('%.0f-0', slot), 'snapshot', ARGV[1])
  redis.call('EXPIRE', stream, keep)
  return true
end

if not keep_in(KEYS[1], ARGV[2], 60000) then
  return {0, {}, {}}
end
keep_in(KEYS[2], ARGV[3], 300000)

local began, ended, found = {}, {}, {}
for n = 5, #ARGV do
  found[ARGV[n]] = true
  if redis.call('HSETNX', KEYS[3], ARGV[n], string.format('%.0f', now_ms)) == 1 then
    began[#began + 1] = ARGV[n]
  end
end
local open = redis.call('HGETALL', KEYS[3])
for n = 1, #open, 2 do
  if not found[open[n]] then
    redis.call('HDEL', KEYS[3], open[n])
    ended[#ended + 1] = open[n]
    ended[#ended + 1] = open[n + 1]
  end
end
redis.call('EXPIRE', KEYS[3], keep)
return {1, began, ended}
