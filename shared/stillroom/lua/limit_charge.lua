-- Counts the hits that a process admitted while the server was away, whatever the quota says. A charge may be sent
-- again: it names the total of this log of the process, and the reservations by their ids.
-- KEYS  1 log  2 the process' log: how much of it was told before  3… reservations
-- ARGV  1 hits without the reserved ones  2 µs since the last of them  3 quota  4 window µs
--       5 how many such hits there have ever been  6 longest window of the limit's name, µs
--       7… hits of each reservation, µs since them
-- returns {hits used, µs until some come back, 0, µs until all have, now}
-- include: time hits late_hits reservation
-- flags: allow-oom

local now, quota, window = now_us(), tonumber(ARGV[3]), tonumber(ARGV[4])
local keep = tonumber(ARGV[6])
local life = life_of(keep)
-- All that is kept, not only what counts here: another limit of this name may have the longer window.
local log = read_hits(KEYS[1], redis.call('MGET', KEYS[1])[1], now, keep, life)
local has_changed = false

local function charge(hits, age)
  if hits > 0 and age < keep then
    put_hits(log, now - age, hits, quota, window)
    has_changed = true
  end
end

local told, total = tonumber(redis.call('GET', KEYS[2]) or '') or 0, tonumber(ARGV[5])
redis.call('SET', KEYS[2], plain(math.max(told, total)), 'PX', plain(keep / 1000))
charge(math.min(tonumber(ARGV[1]), total - told), tonumber(ARGV[2]))
for i = 3, #KEYS do
  local cost, age = tonumber(ARGV[1 + 2 * i]), tonumber(ARGV[2 + 2 * i])
  local known = redis.call('HMGET', KEYS[i], KEYS[1], '!' .. KEYS[1])
  if not known[1] then
    charge(tonumber(known[2] or cost), age)
    note_reserved(KEYS[i], KEYS[1], now - age, now, keep / 1000)
    keep_for(KEYS[i], keep / 1000)
  end
end
if has_changed then
  save(KEYS[1], log, life)
end
local first, used = 1, 0
while log[first] and log[first] <= now - window do
  first = first + 2
end
for i = first + 1, #log, 2 do
  used = used + log[i]
end
local last = #log - 1
if first > last then
  return {0, 0, 0, 0, now}
end
return {used, log[first] + window - now, 0, log[last] + window - now, now}
