-- Returns how long the hits of limits are kept: for the longest window of each name. Processes report their windows now
-- and then. A window that no process reported for its own length is forgotten.
-- KEYS  1 windows
-- ARGV  1 most names  2… name, window µs …
-- returns the longest window of each name, µs
-- include: time
-- flags: allow-oom

local KEPT_MS = 366 * 86400000
local now, longest = now_us(), {}
for i = 2, #ARGV, 2 do
  local name, mine = ARGV[i], tonumber(ARGV[i + 1])
  local window, seen = string.match(redis.call('HGET', KEYS[1], name) or '', '^(%d+) (%d+)$')
  window, seen = tonumber(window) or 0, math.min(tonumber(seen) or 0, now)
  if mine >= window or now - seen > window then
    window = mine
    if redis.call('HLEN', KEYS[1]) < tonumber(ARGV[1]) or redis.call('HEXISTS', KEYS[1], name) == 1 then
      redis.call('HSET', KEYS[1], name, plain(mine) .. ' ' .. plain(now))
    end
  end
  longest[#longest + 1] = plain(window)
end
redis.call('PEXPIRE', KEYS[1], KEPT_MS)
return longest
