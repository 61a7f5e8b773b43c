-- Reads leases. The value of a lease's key ends with the time it was given for, ms:
--   load.<token>.<ms>                one load of a missing value
--   refresh.<token>.<ms>.<failures>  an ordered refresh
--   working.<token>.<ms>.<failures>  a refresh that a worker has begun
--   backoff.<ms>.<failures>          after a failed refresh; its key stays longer, for the count

-- Returns whether a holder still has the lease. A lease ends with its key, but a server whose clock was put back keeps
-- the key longer. So a lease with more time left than it was given is over (`usual`, where its value tells no time).
local function holds(lease, holder, usual)
  local given = string.match(holder, '^%a+%.%x+%.(%d+)') or usual
  return redis.call('PTTL', lease) <= tonumber(given)
end
