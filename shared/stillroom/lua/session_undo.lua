-- Undoes a creation or a rotation whose reply was lost, and keeps it from happening later if it is still on its way:
-- no client has the token. A session that was rotated has its former name again.
-- KEYS  1 the name that no client has  2… the name it was rotated from, under each pepper
-- ARGV  1 prefix
-- returns 1 undone, 0 it had not happened
-- include: time session session_index

local MINUTES_MS = 600000 -- no command is under way for longer
local prefix, now = ARGV[1], now_us()
local session = read(prefix, string.sub(KEYS[1], #prefix + 3))

-- Finds the name that leads here, if it does.
local function former_name()
  for i = 2, #KEYS do
    local former = read(prefix, string.sub(KEYS[i], #prefix + 3))
    if former and former.to and former.to ~= session.h then -- a name under another pepper
      former = read(prefix, former.to)
    end
    if former and former.to == session.h then
      return former.h
    end
  end
end

local is_there = session and not session.to
local former = is_there and former_name()
if former and redis.call('HGET', prefix .. 's:' .. former, '_ended') then -- it has been asked for its end meanwhile
  former = nil
end
if former then
  local key, h = prefix .. 's:' .. former, session.h
  redis.call('RENAME', KEYS[1], key)
  redis.call('PEXPIRE', key, plain(life_of(session.deadline, now)))
  session.h = former
  index_session(prefix, session, life_of(session.limit, now), h)
elseif is_there then
  drop(prefix, session)
end
if not (session and session.to) then -- the first write takes no memory: see session_sweep
  redis.call('PEXPIRE', KEYS[1], plain(MINUTES_MS))
  redis.call('HSET', KEYS[1], '_never', '1')
  if former then -- a list may have shown this name: whoever ends it ends the session
    redis.call('HSET', KEYS[1], '_to', former, '_until', '1', '_u', session.user)
  end
  redis.call('PEXPIRE', KEYS[1], plain(MINUTES_MS))
end
return is_there and 1 or 0
