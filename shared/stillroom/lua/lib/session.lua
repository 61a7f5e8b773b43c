-- Sessions. All keys of a shard begin with one prefix and live in one slot, so each act is one script.
--   s:<h>     the record: _u user ('' anonymous), _c created, _l last seen, _x absolute deadline, _i idle, _s stamp,
--             _v version, _t tags, one a line, _m meta, _b bytes of data; and the data, one JSON a key. Times: µs.
--             Or, where a session was rotated: _to its new name, _until the end of grace, _u user
--   u:<user>  g:<tag>   names → stamp
--   x         <h>\n<user>\n<tags> → when to look at it again, µs: enough to clean up after a record that is gone
--   rev       u:<user>, g:<tag> revoked and not yet deleted → stamp: what was made up to it is dead
--   clock     the newest stamp
-- A stamp is max(TIME in µs, newest + 1): it orders creations and revocations also where the clock steps back.

local SLACK_MS = 60000 -- a record outlives its session by this: the script decides, not the key's TTL
local HOPS = 8 -- rotations within one grace that an old name still finds its way through

local function keep_for(key, ms)
  if redis.call('PTTL', key) < ms then
    redis.call('PEXPIRE', key, plain(ms))
  end
end

local function next_stamp(prefix, now)
  local newest = tonumber(redis.call('GET', prefix .. 'clock') or '0')
  local stamp = math.max(now, newest + 1)
  redis.call('SET', prefix .. 'clock', plain(stamp), 'KEEPTTL')
  return stamp
end

local function each_line(text)
  return string.gmatch(text, '[^\n]+')
end

local function member_of(h, user, tags)
  return h .. '\n' .. user .. '\n' .. tags
end

local function read_member(member)
  local first = string.find(member, '\n', 1, true)
  local second = string.find(member, '\n', first + 1, true)
  return {
    h = string.sub(member, 1, first - 1),
    user = string.sub(member, first + 1, second - 1),
    tags = string.sub(member, second + 1),
  }
end

local function read(prefix, h)
  local key = prefix .. 's:' .. h
  local f = redis.call('HMGET', key, '_u', '_s', '_l', '_x', '_i', '_t', '_to', '_until')
  if f[7] then
    return {h = h, to = f[7], grace_until = tonumber(f[8]), user = f[1]}
  end
  if not f[2] then
    return nil
  end
  local session = {
    h = h, key = key, user = f[1], tags = f[6],
    stamp = tonumber(f[2]), seen = tonumber(f[3]), limit = tonumber(f[4]), idle = tonumber(f[5]),
  }
  session.deadline = math.min(session.seen + session.idle, session.limit)
  return session
end

local function is_revoked(prefix, session)
  if redis.call('EXISTS', prefix .. 'rev') == 0 then
    return false
  end
  local names = {'u:' .. session.user} -- nobody revokes '', the user of the anonymous
  for tag in each_line(session.tags) do
    names[#names + 1] = 'g:' .. tag
  end
  for _, stamp in ipairs(redis.call('ZMSCORE', prefix .. 'rev', unpack(names))) do
    if stamp and tonumber(stamp) >= session.stamp then
      return true
    end
  end
  return false
end

-- The living session under one of the names in KEYS, or nil and why not.
local function find(prefix, now)
  for _, key in ipairs(KEYS) do
    local session = read(prefix, string.sub(key, #prefix + 3))
    for _ = 1, HOPS do
      if not (session and session.to) then
        break
      end
      if now >= session.grace_until then
        return nil, {'replayed', session.to, session.user}
      end
      session = read(prefix, session.to)
    end
    if session and not session.to then
      if now >= session.deadline then
        return nil, {'expired'}, session
      end
      if is_revoked(prefix, session) then
        return nil, {'revoked'}, session
      end
      return session
    end
  end
  return nil, {'missing'}
end

-- PEXPIRE first: a server that is full refuses a script's first write if it takes memory, and only the first.
local function see(session, now)
  session.seen = math.max(now, session.seen)
  session.deadline = math.min(session.seen + session.idle, session.limit)
  redis.call('PEXPIRE', session.key, plain(math.ceil((session.deadline - now) / 1000) + SLACK_MS))
  redis.call('HSET', session.key, '_l', plain(session.seen))
end

-- → whether it was written down
local function touch(session, now, interval)
  local is_due = now - session.seen >= math.min(interval, session.idle / 20)
  if is_due then
    see(session, now)
  end
  return is_due
end

local function drop(prefix, session)
  redis.call('UNLINK', prefix .. 's:' .. session.h)
  redis.call('ZREM', prefix .. 'x', member_of(session.h, session.user, session.tags))
  if session.user ~= '' then
    redis.call('ZREM', prefix .. 'u:' .. session.user, session.h)
  end
  for tag in each_line(session.tags) do
    redis.call('ZREM', prefix .. 'g:' .. tag, session.h)
  end
end

-- What a record says of itself, tab between tab, and its data put together to one JSON object. Nothing is decoded:
-- the parts hold no tab, and each value is JSON already. Two strings are read faster than thirty.
local OWN = {'_u', '_c', '_l', '_x', '_i', '_v', '_t', '_m'}

local function answer(h, key)
  local all, own, data = redis.call('HGETALL', key), {}, {}
  for i = 1, #all, 2 do
    if string.byte(all[i]) == 95 then -- _
      own[all[i]] = all[i + 1]
    else
      data[#data + 1] = '"' .. all[i] .. '":' .. all[i + 1]
    end
  end
  local head = {}
  for i, field in ipairs(OWN) do
    head[i] = own[field] or ''
  end
  return {'ok', h, table.concat(head, '\t'), '{' .. table.concat(data, ',') .. '}'}
end

-- Looks at the sessions that are due, oldest first: drops the dead, puts off the living.
-- returns {h, user, h, user …} of the dead, how many were due, how long the oldest had been, µs
local function sweep(prefix, now, most)
  local ended, due = {}, redis.call('ZRANGEBYSCORE', prefix .. 'x', '-inf', plain(now), 'WITHSCORES', 'LIMIT', 0, most)
  for i = 1, #due, 2 do
    local session = read_member(due[i])
    local record = read(prefix, session.h)
    if record and not record.to and now < record.deadline then
      redis.call('ZADD', prefix .. 'x', plain(record.deadline), due[i])
    else
      drop(prefix, session)
      ended[#ended + 1] = session.h
      ended[#ended + 1] = session.user
    end
  end
  return ended, #due / 2, due[2] and now - tonumber(due[2]) or 0
end
