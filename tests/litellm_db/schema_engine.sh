#!/bin/sh
# Prisma asks its schema engine for a version before it generates the client; migrations are applied by psql.
echo "schema-engine-cli $PRISMA_EXPECTED_ENGINE_VERSION"
