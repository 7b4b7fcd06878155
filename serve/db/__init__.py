"""What a server stores: one class a table, migrations, and the queries of each kind of object.
May import jaxlora's core and config, and what train/jobs calls a job's status; the only folder with SQL; no jax.
What a tenant may see is a condition of the query. A revision that a server has run never changes."""
