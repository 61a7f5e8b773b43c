-- Compares settings that all processes of a namespace must share. The first process sets a value, and all others are
-- told that value and which process set it. A rule says what another value means:
--   same     nothing changes: the process that brings another value is told the agreed one
--   largest  the larger number is agreed from now on
--   smallest the smaller number is agreed from now on
--   change   the other value is agreed from now on, because a person ordered it
-- The id of an agreement is the time it was made. It changes when `change` brings another value.
-- Every process asks before its first read. So this has no flags: with some it would count as a script that writes, and
-- a server that refuses all writes (MISCONF, NOREPLICAS) would refuse it where it only reads.
-- KEYS  1 agreed
-- ARGV  1 the calling process  2 most settings that are kept  3… name, value, rule of each setting
-- returns for each setting the agreed value, its id, the process that set it, and 1 if nothing was agreed before
-- include: time

local function kept(name)
  local value, id, who = string.match(redis.call('HGET', KEYS[1], name) or '', '^([^\t]*)\t(%d+)\t(.*)$')
  return value, id, who
end

local function keep(name, value, id)
  redis.call('HDEL', KEYS[1], '') -- no such field exists; the first write takes no memory: see session_sweep
  if redis.call('HLEN', KEYS[1]) < tonumber(ARGV[2]) or redis.call('HEXISTS', KEYS[1], name) == 1 then
    redis.call('HSET', KEYS[1], name, value .. '\t' .. id .. '\t' .. ARGV[1])
  end
  return value, id, ARGV[1]
end

local function is_larger(value, agreed)
  local number, other = tonumber(value), tonumber(agreed)
  return number and (not other or number > other)
end

local told = {}
for i = 3, #ARGV, 3 do
  local name, mine, rule = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local value, id, who = kept(name)
  local is_new = not value and 1 or 0
  if not value then
    value, id, who = keep(name, mine, plain(now_us()))
  elseif rule == 'change' and mine ~= value then
    value, id, who = keep(name, mine, plain(math.max(now_us(), tonumber(id) + 1)))
  elseif rule == 'largest' and is_larger(mine, value) or rule == 'smallest' and is_larger(value, mine) then
    value, id, who = keep(name, mine, id)
  end
  told[#told + 1] = value
  told[#told + 1] = id
  told[#told + 1] = who
  told[#told + 1] = is_new
end
return told
