-- Keeps the clock of invalidations: `<epoch>.<seq>` under one key, and in `marks` the member `~<epoch>` with the same
-- seq. seq = max(TIME in µs, seq + 1) is made here only, so an app's clock never orders anything.
-- A new epoch begins where the clock is lost, and where the marks are lost, because `~<epoch>` no longer equals the
-- clock. Everything stamped in another epoch is dead, so a loss causes misses and never a stale read.
-- The epoch is in the member so that a reader who has the clock of one epoch and, a moment later, the marks of
-- the next can tell.
--
-- A server may also come back with an older state of clock, marks and entries together, which still agree. So `@` in
-- the marks tells which run of the server the epoch lives on (and which history that copied before it took over: a
-- server that was a replica meanwhile is another one), and `#` how many shards the cache had when the epoch began;
-- verify_epoch.lua compares them with today's. Where every process waits until a replica has its invalidation,
-- `&` holds the id of the history that the server writes and its replicas copy.
-- include: time

-- Returns the server's INFO, or nothing where this user may not ask for it.
local function info(section)
  local text = redis.pcall('INFO', section)
  return type(text) == 'string' and text or ''
end

-- Returns the first 48 bits of an id, which a score can hold; 0 where there is no id.
local function short_id(text, name)
  return tonumber(string.sub(string.match(text, name .. ':(%x+)') or '0', 1, 12), 16)
end

-- Returns 0 where this user may not ask.
local function this_run()
  local run = short_id(info('server'), 'run_id')
  return run == 0 and 0 or (run + short_id(info('replication'), 'master_replid2')) % 2 ^ 48
end

local function write_clock(clock, marks, epoch, seq)
  local value = epoch .. '.' .. plain(seq)
  redis.call('SET', clock, value)
  redis.call('ZADD', marks, plain(seq), '~' .. epoch)
  return value
end

-- Writes down where the epoch lives, and whether a server that takes this one's place may go on with it.
local function settle_epoch(marks, is_heritable)
  redis.call('ZADD', marks, plain(this_run()), '@')
  if is_heritable then
    redis.call('ZADD', marks, plain(short_id(info('replication'), 'master_replid')), '&')
  else
    redis.call('ZREM', marks, '&')
  end
end

-- Begins an epoch at a seq and returns its name. `begin` holds the start of the name and, behind `#`, the number of
-- shards, and `+` where a replica may go on with the epoch.
-- The name ends with the seq, so that none begins twice, however often a command arrives.
local function begin_epoch(marks, begin, seq)
  local name, shards, heritable = string.match(begin, '^(%w+)#(%d+)(%+?)$')
  redis.call('ZADD', marks, shards, '#')
  settle_epoch(marks, heritable == '+')
  return name .. string.format('%x', seq)
end

-- Returns epoch and seq, as written; nothing where there is no clock of ours.
local function known_clock(clock)
  local value = redis.call('GET', clock)
  local epoch, seq = string.match(value or '', '^(%w+)%.(%d+)$')
  if epoch and #seq <= 16 then
    return epoch, tonumber(seq), value
  end
end

local MOST = '9007199254740991' -- 2^53 - 1: a larger score is none of ours, and no clock could go on from it

-- Returns the seq of a new moment, where the clock shows `seq` or is lost.
local function next_seq(marks, seq)
  if not seq then
    local newest = redis.call('ZRANGE', marks, MOST, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')
    seq = tonumber(newest[2] or '0')
  end
  return math.max(now_us(), seq + 1)
end

-- Returns epoch and seq, as written. Begins an epoch where there is no clock.
local function read_clock(clock, marks, begin)
  local epoch, seq, value = known_clock(clock)
  if epoch then
    return epoch, seq, value
  end
  seq = next_seq(marks)
  epoch = begin_epoch(marks, begin, seq)
  return epoch, seq, write_clock(clock, marks, epoch, seq)
end

-- Returns epoch and seq of a new moment, not yet written, whether its epoch has just begun, and the clock before it.
local function next_moment(clock, marks, begin)
  local epoch, now, before = known_clock(clock)
  local seq = next_seq(marks, now)
  if epoch and tonumber(redis.call('ZSCORE', marks, '~' .. epoch) or '0') == now then
    return epoch, seq, false, before
  end
  redis.call('ZREM', marks, '~' .. (epoch or ''))
  return begin_epoch(marks, begin, seq), seq, true, before or ''
end
