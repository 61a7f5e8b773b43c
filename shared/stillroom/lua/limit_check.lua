-- Checks one request: first its bans, then all its limits. It consumes all limits or none.
-- KEYS  1 stream of events  2 widths of bans  3… bans, then the log of each limit, then the reservation if there is one
-- ARGV  1 'take' | 'quiet' (tells nothing of this request) | 'look' (consumes and tells nothing)
--       2 cost  3 number of bans  4 number of limits
--       5 denials that the process answered from memory since: '<number of the limit>:<how many>' …, '' for none
--       6 ms a reservation lives, '' for none  7 how many of the first limits write an event near their quota
--       8 the widths of bans as the process knows them: it has named the bans of those
--       9 a letter for each limit, 's' for one in shadow, which denies nothing; '' where none is
--       10… quota, window µs, and ms that its log is kept, of each limit: see lib/hits; then how many events
--       the stream keeps; then the fields of an event: 'ip', address, 'user', HMAC …
-- returns {1 admitted | 0 denied, now, then for each limit: hits used, µs until some come back (0: none are used),
--          µs until this request fits (0: it does, -1: never), µs until all have come back}
--         {-1, now, ms the ban lasts, the number of the ban}
--         {-2, now, the widths of bans}: others than the process knows. Nothing was done: the process asks again
-- include: time hits
-- flags: allow-oom

local NEAR_SHARE, NEAR_LEAST = 0.8, 10
local taking, telling, cost = ARGV[1] ~= 'look', ARGV[1] == 'take', tonumber(ARGV[2])
local bans, count = tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_us()

-- One MGET for all of them: each command of a script costs as much as the rest of it.
local held = redis.call('MGET', unpack(KEYS, 2, 2 + bans + count))
if (held[1] or '') ~= ARGV[8] then
  return {-2, now, held[1] or ''}
end
for i = 1, bans do
  if held[1 + i] then
    local left = redis.call('PTTL', KEYS[2 + i])
    -- A ban from before the clock stepped back would last longer by that step.
    local since, till = string.match(held[1 + i], '"since":([%d.]+)'), string.match(held[1 + i], '"until":([%d.]+)')
    local whole = since and till and math.ceil((tonumber(till) - tonumber(since)) * 1000)
    if whole and left > whole + 1000 then
      redis.call('PEXPIRE', KEYS[2 + i], plain(whole))
      left = whole
    end
    return {-1, now, left, i}
  end
end

-- Returns µs until the oldest surplus hits have left.
local function wait_of(log, excess, window)
  for i = 1, #log, 2 do
    excess = excess - log[i + 1]
    if excess <= 0 then
      return log[i] + window - now
    end
  end
  return -1
end

local limits, denied = {}, nil
for i = 1, count do
  local key, numbers = KEYS[2 + bans + i], 7 + 3 * i
  local quota, window, life = tonumber(ARGV[numbers]), tonumber(ARGV[numbers + 1]), ARGV[numbers + 2]
  local log, used, old, raw = read_hits(key, held[1 + bans + i], now, window, life)
  local excess = used + cost - quota
  local wait = excess > 0 and wait_of(log, excess, window) or 0
  -- A limit in shadow counts what it would have admitted, and nobody is denied for it.
  local is_let_off = wait ~= 0 and string.sub(ARGV[9], i, i) == 's'
  limits[i] = {
    key = key, quota = quota, window = window, life = life,
    log = log, used = used, old = old, raw = raw, wait = wait, is_let_off = is_let_off,
  }
  denied = denied or (wait ~= 0 and not is_let_off and limits[i])
end

-- A reservation that was refunded before it came here, or that comes a second time, takes nothing.
local is_reserved = ARGV[6] ~= '' and redis.call('EXISTS', KEYS[#KEYS]) == 1

local near = nil
if taking and not is_reserved and not denied then
  for i = 1, cost > 0 and count or 0 do
    local limit = limits[i]
    if not limit.is_let_off then
      local same = put_hits(limit.log, now, cost, limit.quota, limit.window)
      limit.used = limit.used + cost
      save(limit.key, limit.log, limit.life, limit.old, limit.raw, same)
      if limit.used >= NEAR_SHARE * limit.quota and limit.quota >= NEAR_LEAST and i <= tonumber(ARGV[7]) then
        near = near or {}
        near[#near + 1] = limit
      end
    end
  end
  if ARGV[6] ~= '' then
    -- include: reservation
    for _, limit in ipairs(limits) do
      if not limit.is_let_off then
        note_reserved(KEYS[#KEYS], limit.key, now, now, tonumber(ARGV[6]))
      end
    end
    redis.call('PEXPIRE', KEYS[#KEYS], ARGV[6])
  end
end

if taking and not is_reserved and (denied or near or ARGV[5] ~= '') then
  -- include: limit_events
  local fields = 11 + 3 * count
  for number, more in string.gmatch(ARGV[5], '(%d+):(%d+)') do
    limits[tonumber(number)].denials = tonumber(more)
  end
  if denied and telling then
    denied.denials = (denied.denials or 0) + 1
  end
  for _, limit in ipairs(limits) do
    if limit.denials then
      count_denials(limit, limit.denials, fields)
    end
  end
  for _, limit in ipairs(telling and near or {}) do
    tell_if_near(limit, fields)
  end
end

local function said_of(i)
  local limit = limits[i]
  if limit then
    local some, all = comes_back(limit.log, now, limit.window)
    return limit.used, some, limit.wait, all, said_of(i + 1)
  end
end

return {denied and 0 or 1, now, said_of(1)}
