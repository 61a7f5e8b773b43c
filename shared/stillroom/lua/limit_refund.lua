-- Gives back what a reservation consumed: once, and from the entries that its hits are in.
-- KEYS  1 reservation  2… log of each limit
-- ARGV  1 when it was made, µs  2 cost  3… window µs of each limit
-- returns 1 given back, 0 it had been before, or was committed, or its time is over
-- include: clock hits
-- flags: allow-oom

if redis.call('DEL', KEYS[1]) == 0 then
  return 0
end
local now, at, cost = now_us(), tonumber(ARGV[1]), tonumber(ARGV[2])

-- The hits are in the first entry that ends at or after them: entries carry the last of their times. None does where
-- the clock stepped back since; then they are in the newest, give or take an entry.
local function place_of(log)
  for i = 1, #log, 2 do
    if log[i] >= at then
      return i
    end
  end
  return #log - 1
end

local held = redis.call('MGET', unpack(KEYS))
for i = 2, #KEYS do
  local window = tonumber(ARGV[i + 1])
  local log = read_hits(KEYS[i], held[i], now, window)
  if #log > 0 and at > now - window then
    local place = place_of(log)
    log[place + 1] = log[place + 1] - cost
    if log[place + 1] <= 0 then
      table.remove(log, place)
      table.remove(log, place)
    end
    if #log == 0 then
      redis.call('DEL', KEYS[i])
    else
      save(KEYS[i], log, window)
    end
  end
end
return 1
