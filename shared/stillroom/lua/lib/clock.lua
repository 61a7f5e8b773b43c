-- The clock of invalidations: `<epoch>.<seq>` under one key, and in `marks` the member `~<epoch>` with the
-- same seq. seq = max(TIME in µs, seq + 1): made here only, so an app's clock never orders anything.
-- A clock that is lost starts a new epoch; so do marks that were lost, because `~<epoch>` no longer equals
-- the clock. Everything stamped in another epoch is dead, so loss is a miss and never a stale read.
-- The epoch is in the member so that a reader who has the clock of one epoch and, a moment later, the marks of
-- the next can tell.

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
  redis.call('ZADD', marks, plain(seq), '~' .. epoch)
  return value
end

-- → epoch, seq, as written. Begins `new_epoch` where there is no clock.
local function read_clock(clock, marks, new_epoch)
  local value = redis.call('GET', clock)
  if value then
    local epoch, seq = string.match(value, '^(%w+)%.(%d+)$') -- anything else is no clock of ours
    if epoch and #seq <= 16 then
      return epoch, tonumber(seq), value
    end
  end
  local newest = redis.call('ZRANGE', marks, '+inf', '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')
  local seq = math.max(now_us(), tonumber(newest[2] or '0') + 1)
  return new_epoch, seq, write_clock(clock, marks, new_epoch, seq)
end

-- → epoch, seq of a new moment, not yet written.
local function next_moment(clock, marks, new_epoch)
  local epoch, seq = read_clock(clock, marks, new_epoch)
  if tonumber(redis.call('ZSCORE', marks, '~' .. epoch) or '0') ~= seq then
    redis.call('ZREM', marks, '~' .. epoch)
    epoch = new_epoch
  end
  return epoch, math.max(now_us(), seq + 1)
end
