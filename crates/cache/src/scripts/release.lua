-- RELEASE: a reader that will not fill after all gives its lease back, so that nobody waits for it.
-- KEYS: guard. ARGV: token.

if redis.pcall('GET', KEYS[1]) == 'L' .. ARGV[1] then return redis.call('UNLINK', KEYS[1]) end
return 0
