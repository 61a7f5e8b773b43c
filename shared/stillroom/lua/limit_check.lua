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
local cost, bans, count = ARGV[2] + 0, ARGV[3] + 0, ARGV[4] + 0
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
    local since = tonumber(string.match(held[1 + i], '"since":([%d.]+)') or '')
    local till = tonumber(string.match(held[1 + i], '"until":([%d.]+)') or '')
    local whole = since and till and math.ceil((till - since) * 1000)
    if whole and left > whole + 1000 then
      redis.call('PEXPIRE', KEYS[2 + i], plain(whole))
      left = whole
    end
    return {-1, now, left, i}
  end
end

-- The answer says of limit i, from 4 * i - 1 on: hits used, µs until some come back, µs to wait, µs until all have.
-- The nils make room for those of two limits at once, and no limit has a table of its own: see decision 96.
local answer, logs = {1, now, nil, nil, nil, nil, nil, nil, nil, nil}, {nil, nil}
local older, denied = nil, nil
for i = 1, count do
  local at, numbers, said = 1 + bans + i, 7 + 3 * i, 4 * i - 1
  local quota, window = ARGV[numbers] + 0, ARGV[numbers + 1] + 0
  local log, used, packed, old = read_hits(KEYS[1 + at], held[at], now, window, ARGV[numbers + 2])
  local wait, excess, last = 0, used + cost - quota, #log - 1
  if excess > 0 then
    wait = -1
    for j = 1, last, 2 do -- until the oldest surplus hits have left
      excess = excess - log[j + 1]
      if excess <= 0 then
        wait = log[j] + window - now
        break
      end
    end
    -- A limit in shadow counts what it would have admitted, and nobody is denied for it.
    denied = denied or (string.sub(ARGV[9], i, i) ~= 's' and i or nil)
  end
  logs[i], held[at] = log, packed
  if old then
    older = older or {}
    older[i] = old
  end
  answer[said], answer[said + 2] = used, wait
  answer[said + 1], answer[said + 3] = 0, 0
  if last > 0 then
    answer[said + 1], answer[said + 3] = log[1] + window - now, log[last] + window - now
  end
end
answer[1] = denied and 0 or 1
-- A reservation that was refunded before it came here, or that comes a second time, takes nothing.
if ARGV[1] == 'look' or (ARGV[6] ~= '' and redis.call('EXISTS', KEYS[#KEYS]) == 1) then
  return answer
end

local near = nil
if not denied then
  for i = 1, cost > 0 and count or 0 do
    local at, numbers, said = 1 + bans + i, 7 + 3 * i, 4 * i - 1
    if answer[said + 2] == 0 then
      local quota, window, life = ARGV[numbers] + 0, ARGV[numbers + 1] + 0, ARGV[numbers + 2]
      local log, slice = logs[i], window / SLICES
      local size, hits = #log, cost
      if quota > SLICES and size > 0 and math.floor(log[size - 1] / slice) == math.floor(now / slice) then
        size, hits = size - 2, math.min(log[size] + cost, MOST)
      end
      local packed = struct.pack(ONE, now, hits)
      if size > 0 then -- the entries before it are as they were
        packed = string.sub(held[at], 1, size / 2 * ENTRY) .. packed
      end
      if older and older[i] then
        -- include: older_hits
        packed = pack_older(older[i], life) .. packed
      end
      redis.call('SET', KEYS[1 + at], packed, 'PX', life)
      local used = answer[said] + cost
      answer[said], answer[said + 3] = used, window
      answer[said + 1] = size > 0 and answer[said + 1] or window
      if used >= NEAR_SHARE * quota and quota >= NEAR_LEAST and i <= ARGV[7] + 0 then
        near = near or {}
        near[#near + 1] = i
      end
    end
  end
  if ARGV[6] ~= '' then
    -- include: reservation
    for i = 1, count do
      if answer[4 * i + 1] == 0 then
        note_reserved(KEYS[#KEYS], KEYS[2 + bans + i], now, now, tonumber(ARGV[6]))
      end
    end
    redis.call('PEXPIRE', KEYS[#KEYS], ARGV[6])
  end
end

if denied or near or ARGV[5] ~= '' then
  -- include: limit_events
  local fields, denials, is_telling = 11 + 3 * count, {}, ARGV[1] == 'take'
  for number, more in string.gmatch(ARGV[5], '(%d+):(%d+)') do
    denials[tonumber(number)] = tonumber(more)
  end
  if denied and is_telling then
    denials[denied] = (denials[denied] or 0) + 1
  end
  for i = 1, count do
    if denials[i] then
      count_denials(KEYS[2 + bans + i], denials[i], fields)
    end
  end
  for _, i in ipairs(is_telling and near or {}) do
    local numbers = 7 + 3 * i
    tell_if_near(KEYS[2 + bans + i], answer[4 * i - 1], ARGV[numbers + 1], ARGV[numbers + 2], fields)
  end
end
return answer
