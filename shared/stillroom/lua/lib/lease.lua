-- The value of a lease's key, with the time it was given for, ms:
--   load.<token>.<ms>                one load of a missing value
--   refresh.<token>.<ms>.<failures>  an ordered refresh
--   working.<token>.<ms>.<failures>  a refresh that a worker has begun
--   backoff.<ms>.<failures>          after a failed refresh; its key stays longer, for the count

-- Whether a holder still has it. A lease ends with its key; but a server whose clock was put back keeps the key for as
-- much longer. No lease has more time left than it was given (`usual`, where it does not say).
local function holds(lease, holder, usual)
  local given = string.match(holder, '^%a+%.%x+%.(%d+)') or usual
  return redis.call('PTTL', lease) <= tonumber(given)
end
