-- Hits that a process admitted by itself while the server was away: they count, whatever the quota says.
-- KEYS  1 log
-- ARGV  1 hits  2 µs since the last of them  3 quota  4 window µs
-- returns hits used
-- include: clock hits
-- flags: allow-oom

local now, window = now_us(), tonumber(ARGV[4])
local log, used = read_hits(KEYS[1], redis.call('MGET', KEYS[1])[1], now, window)
local at = now - tonumber(ARGV[2])
if at <= now - window then
  return used
end
put_hits(log, at, tonumber(ARGV[1]), tonumber(ARGV[3]), window)
save(KEYS[1], log, window)
return used + tonumber(ARGV[1])
