-- Adds the limits' events to their stream, KEYS[1]: denials, at 1, 2, 4, 8 … of a subject, and subjects near a quota.
-- `fields`: where among the arguments the fields of an event begin. Before them stands how many events are kept.

-- A key that has more time left than it was given is from before the clock was put back: it ends as if it had just been
-- given its time.

local DENIED_MS = 600000

-- An event names an address only if its limit counts by address. A limit by user counts guesses from everywhere: the
-- 64th may come from the user himself, and his address must not be banned for the 63 guesses of others.
local function first_field(log, fields)
  local kinds = '&' .. string.match(log, '{rl:([^:]+):') .. '&'
  local is_told = ARGV[fields] ~= 'ip' or string.find(kinds, '&ip&', 1, true)
  return is_told and fields or fields + 2
end

local function tell(kind, n, log, fields)
  local name = string.match(log, '[^:]+$')
  -- The check is answered even if the server refuses the event.
  redis.pcall('XADD', KEYS[1], 'MAXLEN', '~', ARGV[fields - 1], '*', 'kind', kind, 'n', plain(n), 'limit', name,
    unpack(ARGV, first_field(log, fields)))
end

local function crosses_power_of_two(before, after)
  local power = 1
  while power <= before do
    power = power * 2
  end
  return power <= after
end

-- Writes events at powers of two only, so that a flood of denials makes few events.
local function count_denials(log, more, fields)
  local key = string.match(log, '^.*:') .. '!denied'
  local n = redis.call('INCRBY', key, plain(more))
  if n == more or redis.call('PTTL', key) > DENIED_MS then
    redis.call('PEXPIRE', key, DENIED_MS)
  end
  if crosses_power_of_two(n - more, n) then
    tell('denied', n, log, fields)
  end
end

-- `life`: how long the log is kept, ms: the longest window of its name, and a little more.
local function tell_if_near(log, used, window, life, fields)
  local key = log .. '!near'
  if redis.call('SET', key, '', 'NX', 'PX', plain(window / 1000)) then
    tell('near', used, log, fields)
  elseif redis.call('PTTL', key) > tonumber(life) then
    redis.call('PEXPIRE', key, plain(window / 1000))
  end
end
