-- Settles the final cost of a reservation, once. A lower cost gives hits back, from the entries that hold them; a
-- refund gives back all. A higher cost is counted now, whatever the quota says: it has been used.
-- KEYS  1 reservation  2… log of each limit
-- ARGV  1 when it was made, µs, 0 where only the server knows  2 what it consumed  3 what it cost
--       4 how long to remember that it is over, ms: it may still be on its way; 0: it is not
--       5… quota, window µs, and longest window of its name, µs, of each limit
-- returns 1 settled, or it will be where it comes yet; 0 it was settled or committed before, or its time is over, or it is
--         not known
-- include: time hits late_hits reservation
-- flags: allow-oom

local now, held_cost, cost = now_us(), tonumber(ARGV[2]), tonumber(ARGV[3])
local noted = redis.call('HMGET', KEYS[1], 'over', unpack(KEYS, 2))
if noted[1] then
  return 0
end
local may_come, is_known = tonumber(ARGV[4]) > 0, nil
if may_come then
  is_known = redis.call('EXISTS', KEYS[1]) == 1
  redis.call('HSET', KEYS[1], 'over', '1')
  for i = 2, #KEYS do
    if not noted[i] then -- it has not come to this log
      redis.call('HSET', KEYS[1], '!' .. KEYS[i], ARGV[3])
    end
  end
  keep_for(KEYS[1], tonumber(ARGV[4]))
else
  is_known = redis.call('UNLINK', KEYS[1]) == 1
end
if not is_known then
  return may_come and 1 or 0
end

-- The entries that the hits are in: those of their very time; else the first that ends after them, as entries carry the
-- last of their times. None does where the clock stepped back since: then they are among the newest.
local function take_out(log, at, count)
  local left, later = count, nil
  local function take_from(i)
    local taken = math.min(left, log[i + 1])
    log[i + 1], left = log[i + 1] - taken, left - taken
  end
  for i = 1, #log, 2 do
    if log[i] == at then
      take_from(i)
    elseif log[i] > at and not later then
      later = i
    end
  end
  if left == count then
    later = later or #log - 1
    for i = later, #log - 1, 2 do
      take_from(i)
    end
    for i = later - 2, 1, -2 do
      take_from(i)
    end
  end
  for i = #log - 1, 1, -2 do
    if log[i + 1] == 0 then
      table.remove(log, i)
      table.remove(log, i)
    end
  end
end

local held = redis.call('MGET', unpack(KEYS, 2))
for i = 2, #KEYS do
  local numbers = 3 * i - 1
  local quota, window, life = tonumber(ARGV[numbers]), tonumber(ARGV[numbers + 1]), life_of(ARGV[numbers + 2])
  local at = reserved_at(noted[i], KEYS[i])
  if at and tonumber(ARGV[1]) > 0 then
    at = tonumber(ARGV[1])
  end
  local log, _, _, old = read_hits(KEYS[i], held[i - 1], now, window, life)
  local hits = at and (at > now - window and log or old)
  if cost > held_cost and at then
    put_hits(log, now, cost - held_cost, quota, window)
    save(KEYS[i], log, life, old)
  elseif cost < held_cost and hits and #hits > 0 then
    take_out(hits, at, held_cost - cost)
    if #log == 0 and (not old or #old == 0) then
      redis.call('UNLINK', KEYS[i])
    else
      save(KEYS[i], log, life, old)
    end
  end
end
return 1
