-- One request against all its limits: its bans, then all limits looked at, then all of them consumed, or none.
-- KEYS  1 stream of events  2 widths of bans  3… bans, then the log of each limit, then the reservation if there is one
-- ARGV  1 'take' | 'quiet' (tells nothing of this request) | 'look' (consumes and tells nothing)
--       2 cost  3 number of bans  4 number of limits
--       5 denials that the process answered from memory since: '<number of the limit>:<how many>' …, '' for none
--       6 ms a reservation lives, '' for none  7 number of limits that tell of being near: the first ones
--       8 the widths of bans as the process knows them: it has named the bans of those
--       9 a letter for each limit, 's' for one in shadow, which denies nothing; '' where none is
--       10… quota, window µs, longest window of its name µs of each limit; then the fields of an event: 'ip', address,
--       'user', HMAC …
-- returns {1 admitted | 0 denied, now, then for each limit: hits used, µs until some come back (0: none are used),
--          µs until this request fits (0: it does, -1: never), µs until all have come back}
--         {-1, now, ms the ban lasts, the number of the ban}
--         {-2, now, the widths of bans}: others than the process knows. Nothing was done: it is to ask again
-- include: clock hits reservation
-- flags: allow-oom

local DENIED_MS = 600000
local NEAR_SHARE, NEAR_LEAST = 0.8, 10
local taking, telling, cost = ARGV[1] ~= 'look', ARGV[1] == 'take', tonumber(ARGV[2])
local bans, count = tonumber(ARGV[3]), tonumber(ARGV[4])
local fields = 10 + 3 * count
local now = now_us()

-- One MGET for all of them: each command of a script costs as much as the rest of it.
local held = redis.call('MGET', unpack(KEYS, 2, 2 + bans + count))
if (held[1] or '') ~= ARGV[8] then
  return {-2, now, held[1] or ''}
end
for i = 1, bans do
  if held[1 + i] then
    local left = redis.call('PTTL', KEYS[2 + i])
    -- A ban of before the clock stepped back would last longer by that step.
    local since, till = string.match(held[1 + i], '"since":([%d.]+)'), string.match(held[1 + i], '"until":([%d.]+)')
    local whole = since and till and math.ceil((tonumber(till) - tonumber(since)) * 1000)
    if whole and left > whole + 1000 then
      redis.call('PEXPIRE', KEYS[2 + i], plain(whole))
      left = whole
    end
    return {-1, now, left, i}
  end
end

local limits, denied = {}, nil
for i = 1, count do
  local numbers = 7 + 3 * i
  local limit = {
    key = KEYS[2 + bans + i],
    quota = tonumber(ARGV[numbers]), window = tonumber(ARGV[numbers + 1]), keep = tonumber(ARGV[numbers + 2]),
  }
  limit.log, limit.used, limit.old = read_hits(limit.key, held[1 + bans + i], now, limit.window, limit.keep)
  limits[i] = limit
end

-- µs until the oldest hits that are too many have left.
local function wait_of(limit)
  local excess = limit.used + cost - limit.quota
  if excess <= 0 then
    return 0
  end
  for i = 1, #limit.log, 2 do
    excess = excess - limit.log[i + 1]
    if excess <= 0 then
      return limit.log[i] + limit.window - now
    end
  end
  return -1
end

for i, limit in ipairs(limits) do
  limit.wait = wait_of(limit)
  -- A limit in shadow counts what it would have admitted, and nobody is denied for it.
  limit.is_let_off = limit.wait ~= 0 and string.sub(ARGV[9], i, i) == 's'
  if limit.wait ~= 0 and not limit.is_let_off and not denied then
    denied = limit
  end
end

-- A limit that does not count by address tells of none. One by user counts guesses from everywhere: who makes the 64th
-- may be the user himself, and his address must not be banned for the 63 of others.
local function first_field(limit)
  local kinds = '&' .. string.match(limit.key, '{rl:([^:]+):') .. '&'
  local is_told = ARGV[fields] ~= 'ip' or string.find(kinds, '&ip&', 1, true)
  return is_told and fields or fields + 2
end

local function tell(kind, n, limit)
  local name = string.match(limit.key, '[^:]+$')
  -- A server that will not take an event still answers.
  redis.pcall('XADD', KEYS[1], 'MAXLEN', '~', 100000, '*', 'kind', kind, 'n', plain(n), 'limit', name,
    unpack(ARGV, first_field(limit)))
end

local function crosses_power_of_two(before, after)
  local power = 1
  while power <= before do
    power = power * 2
  end
  return power <= after
end

-- However many denials there are, their events are few: at 1, 2, 4, 8 …
local function count_denials(limit, more)
  local key = string.match(limit.key, '^.*:') .. '!denied'
  redis.call('UNLINK', key .. '!') -- there is none, and it takes no memory: see write
  local n = redis.call('INCRBY', key, plain(more))
  if n == more then
    redis.call('PEXPIRE', key, DENIED_MS)
  end
  if crosses_power_of_two(n - more, n) then
    tell('denied', n, limit)
  end
end

local function tell_if_near(limit)
  if limit.quota >= NEAR_LEAST and limit.used >= NEAR_SHARE * limit.quota
    and redis.call('SET', limit.key .. '!near', '', 'NX', 'PX', plain(limit.window / 1000)) then
    tell('near', limit.used, limit)
  end
end

local function consume(limit)
  put_hits(limit.log, now, cost, limit.quota, limit.window)
  limit.used = limit.used + cost
  save(limit.key, limit.log, limit.keep, limit.old)
end

-- One that was refunded before it came here, or that comes a second time, takes nothing.
local is_reserved = ARGV[6] ~= '' and redis.call('EXISTS', KEYS[#KEYS]) == 1

if taking and not is_reserved then
  for number, more in string.gmatch(ARGV[5], '(%d+):(%d+)') do
    limits[tonumber(number)].denials = tonumber(more)
  end
  if denied and telling then
    denied.denials = (denied.denials or 0) + 1
  end
  for _, limit in ipairs(limits) do
    if limit.denials then
      count_denials(limit, limit.denials)
    end
  end
  if not denied and cost > 0 then
    for i, limit in ipairs(limits) do
      if not limit.is_let_off then
        consume(limit)
        if telling and i <= tonumber(ARGV[7]) then
          tell_if_near(limit)
        end
        if ARGV[6] ~= '' then
          note_reserved(KEYS[#KEYS], limit.key, now, now, tonumber(ARGV[6]))
        end
      end
    end
    if ARGV[6] ~= '' then
      redis.call('PEXPIRE', KEYS[#KEYS], ARGV[6])
    end
  end
end

local reply = {denied and 0 or 1, now}
for _, limit in ipairs(limits) do
  local some, all = comes_back(limit.log, now, limit.window)
  reply[#reply + 1] = limit.used
  reply[#reply + 1] = some
  reply[#reply + 1] = limit.wait
  reply[#reply + 1] = all
end
return reply
