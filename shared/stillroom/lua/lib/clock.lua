-- The clock of invalidations: `<epoch>.<seq>` under one key, and in `marks` the member `~` with the
-- same seq. seq = max(TIME in µs, seq + 1): made here only, so an app's clock never orders anything.
-- A clock that is lost starts a new epoch; so do marks that were lost, because `~` no longer equals
-- the clock. Everything stamped in another epoch is dead, so loss is a miss and never a stale read.

local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function plain(number)
  return string.format('%.0f', number) -- tostring() would round 1.7e15
end

local function write_clock(clock, marks, epoch, seq)
  local value = epoch .. '.' .. plain(seq)
  redis.call('SET', clock, value)
  redis.call('ZADD', marks, plain(seq), '~')
  return value
end

-- → epoch, seq, as written. Begins `new_epoch` where there is no clock.
local function read_clock(clock, marks, new_epoch)
  local value = redis.call('GET', clock)
  if value then
    local dot = string.find(value, '.', 1, true)
    local seq = dot and tonumber(string.sub(value, dot + 1))
    if seq then
      return string.sub(value, 1, dot - 1), seq, value
    end
  end
  local newest = tonumber(redis.call('ZSCORE', marks, '~') or '0')
  local seq = math.max(now_us(), newest + 1)
  return new_epoch, seq, write_clock(clock, marks, new_epoch, seq)
end

-- → epoch, seq of a new moment, not yet written.
local function next_moment(clock, marks, new_epoch)
  local epoch, seq = read_clock(clock, marks, new_epoch)
  if tonumber(redis.call('ZSCORE', marks, '~') or '0') ~= seq then
    epoch = new_epoch
  end
  return epoch, math.max(now_us(), seq + 1)
end
