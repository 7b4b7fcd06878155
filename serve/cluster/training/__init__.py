"""The training group: processes that train the jobs that the keeper places, leases to them and moves bit for bit.
May import serve/server and everything below it, nothing of serve/cluster; carriers of calls stand behind protocols.
The keeper's side is `group` over the pure `placement`; a trainer's is `process`; what travels is `messages`."""
