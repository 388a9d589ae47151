"""Device meshes: axis names and specs (`axes`), device startup (`devices`), device order on TPUs (`topology`)."""
