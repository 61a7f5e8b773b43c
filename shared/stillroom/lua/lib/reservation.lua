-- Keeps reservations. A reservation is a hash, `ns:{rl:!held}:<id>`, that lives as long as its longest window. It maps a
-- log's name to when its hits were counted there, µs, and the log's birth. It also holds `over`, where it was settled and
-- may still be on its way, and under `!` and a log's name what it is to count there when it comes.
-- A log that was reset is another log, born later: nothing of the one before is given back to it.

local function keep_for(key, ms)
  if redis.call('PTTL', key) < ms then
    redis.call('PEXPIRE', key, plain(ms))
  end
end

local function birth_of(log, now, ms)
  local key = log .. '!born'
  local birth = redis.call('GET', key)
  if birth then
    keep_for(key, ms)
    return birth
  end
  redis.call('SET', key, plain(now), 'PX', plain(ms))
  return plain(now)
end

-- Notes the hits of one limit. It gives the reservation no end: its callers do.
local function note_reserved(reservation, log, at, now, ms)
  redis.call('HSET', reservation, log, plain(at) .. ' ' .. birth_of(log, now, ms))
end

-- Returns when it was counted in this log, or nil: it was not, or the log was reset since.
local function reserved_at(noted, log)
  local at, birth = string.match(noted or '', '^(%d+) (%d+)$')
  return birth and birth == redis.call('GET', log .. '!born') and tonumber(at) or nil
end
