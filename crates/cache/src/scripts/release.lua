-- RELEASE: a reader that will not fill after all gives its lease back, so that nobody waits for it.
-- KEYS: guard. ARGV: token. Not the lease, which a reader does not know if the answer was lost.

local own = 'L' .. ARGV[1] .. ':'
local guard = redis.pcall('GET', KEYS[1])
if type(guard) == 'string' and string.sub(guard, 1, #own) == own then return redis.call('UNLINK', KEYS[1]) end
return 0
