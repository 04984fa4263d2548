#!/usr/bin/env node
'use strict';
/* What LiteLLM's database client asks for and no package registry carries: Prisma's query engine as a program.
 *
 * The npm package @prisma/client has the same engine as WebAssembly. This program runs that one behind the HTTP surface
 * of the native program, as far as prisma-client-py 0.11 uses it, and puts one difference right: the Python client
 * writes GraphQL, the WebAssembly engine reads Prisma's JSON protocol.
 *
 * Environment: DATABASE_URL, PRISMA_DML_PATH (both from the Python client), PRISMA_NODE_MODULES. */
const fs = require('node:fs');
const http = require('node:http');
const path = require('node:path');

const ENGINE_VERSION = process.env.PRISMA_EXPECTED_ENGINE_VERSION;
if (process.argv.includes('--version')) {
  console.log(`query-engine ${ENGINE_VERSION}`);
  process.exit(0);
}
const fromNpm = (name) => path.join(process.env.PRISMA_NODE_MODULES, name);

// ------------------------------------------------------------------ GraphQL text -> {alias, name, args, fields}
class Document {
  static TOKENS = /[\s,]*(?:(?<text>"(?:[^"\\]|\\.)*")|(?<number>-?\d[\d.eE+-]*)|(?<word>\w+)|(?<mark>[{}()[\]:]))/y;

  constructor(text) {
    this.tokens = [];
    const pattern = Document.TOKENS;
    for (pattern.lastIndex = 0; text.slice(pattern.lastIndex).trim(); ) {
      const at = pattern.lastIndex;
      const found = pattern.exec(text);
      if (!found) throw new Error(`GraphQL that is not understood: ${text.slice(at, at + 40)}`);
      this.tokens.push(found.groups);
    }
    this.next = 0;
  }
  operations() {
    if (this.tokens[0].word) this.next = 1; // query or mutation
    return this.fields();
  }
  fields() {
    const found = [];
    this.expect('{');
    while (!this.at('}')) found.push(this.field());
    this.expect('}');
    return found;
  }
  field() {
    let name = this.tokens[this.next++].word;
    const alias = name;
    if (this.at(':')) {
      this.expect(':');
      name = this.tokens[this.next++].word;
    }
    const args = this.at('(') ? this.members('(', ')') : {};
    return { alias, name, args, fields: this.at('{') ? this.fields() : null };
  }
  members(open, close) {
    const found = {};
    this.expect(open);
    while (!this.at(close)) {
      const name = this.tokens[this.next++].word;
      this.expect(':');
      found[name] = this.value();
    }
    this.expect(close);
    return found;
  }
  value() {
    if (this.at('{')) return this.members('{', '}');
    if (this.at('[')) {
      const found = [];
      for (this.expect('['); !this.at(']'); ) found.push(this.value());
      this.expect(']');
      return found;
    }
    const { text, number, word } = this.tokens[this.next++];
    if (text !== undefined) return JSON.parse(text);
    if (number !== undefined) return exact(number);
    return { true: true, false: false, null: null }[word] ?? (word === 'null' ? null : word);
  }
  at(mark) {
    return this.tokens[this.next]?.mark === mark;
  }
  expect(mark) {
    if (!this.at(mark)) throw new Error(`GraphQL: ${mark} expected at token ${this.next}`);
    this.next += 1;
  }
}

/** A number without loss: whole ones beyond 2^53 travel as text. */
function exact(digits) {
  const number = Number(digits);
  const whole = /^-?\d+$/.test(digits);
  return whole && !Number.isSafeInteger(number) ? { $type: 'BigInt', value: digits } : number;
}

// ------------------------------------------------------------------ -> JSON protocol
/** Field types of the models, by name. A JSON column's value is marked as such: else its text would be taken as text. */
class Models {
  constructor(datamodel) {
    this.types = {};
    for (const [, model, body] of datamodel.matchAll(/^model (\w+) \{\n([^]*?)^\}/gm)) {
      const columns = [...body.matchAll(/^\s+(\w+)\s+(\w+)/gm)];
      this.types[model] = Object.fromEntries(columns.map(([, name, type]) => [name, type]));
    }
  }
  marked(value, model) {
    if (Array.isArray(value)) return value.map((item) => this.marked(item, model));
    if (value === null || typeof value !== 'object' || '$type' in value) return value;
    const mark = ([name, inner]) => {
      const type = this.types[model]?.[name];
      if (type === 'Json') return [name, asJson(inner)];
      return [name, this.marked(inner, type in this.types ? type : model)];
    };
    return Object.fromEntries(Object.entries(value).map(mark));
  }
  selection(fields, model) {
    const chosen = (field) => {
      if (field.fields === null) return [field.name, true];
      const inner = this.types[model]?.[field.name];
      const args = this.marked(field.args, inner);
      return [field.name, { arguments: args, selection: this.selection(field.fields, inner) }];
    };
    return Object.fromEntries((fields ?? []).map(chosen));
  }
  query({ name, args, fields }) {
    if (name.endsWith('Raw')) return { action: name, query: { arguments: args, selection: {} } };
    const action = Object.keys(this.types).find((model) => name.replace(/OrThrow$/, '').endsWith(model));
    if (!action) throw new Error(`no model for ${name}`);
    const verb = name.replace(action, '');
    return { modelName: action, action: verb, query: this.body(args, fields, action) };
  }
  body(args, fields, model) {
    return { arguments: this.marked(args, model), selection: this.selection(fields, model) };
  }
}

function asJson(value) {
  if (typeof value === 'string') return { $type: 'Json', value };
  if (Array.isArray(value)) return value.map(asJson);
  if (value === null || typeof value !== 'object') return value;
  const inner = ([name, operand]) => [name, name === 'path' ? operand : asJson(operand)]; // {set: ...}, {equals: ...}
  return Object.fromEntries(Object.entries(value).map(inner));
}

/** The engine's answer as the GraphQL protocol gives it: without type marks. */
function unmarked(value) {
  if (Array.isArray(value)) return value.map(unmarked);
  if (value === null || typeof value !== 'object') return value;
  if ('$type' in value) return unmarked(value.value);
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, unmarked(inner)]));
}

/** Rows of a raw query as version 0.11 of the client wants them: each value with its type. */
function rawRows({ columns, types, rows }) {
  const cell = (type, value) => {
    if (value === null) return { prisma__type: 'null', prisma__value: null };
    if (!type.endsWith('-array')) return { prisma__type: type, prisma__value: value };
    const items = value.map((item) => cell(type.slice(0, -'-array'.length), item));
    return { prisma__type: 'array', prisma__value: items };
  };
  return rows.map((row) => Object.fromEntries(columns.map((name, i) => [name, cell(types[i], row[i])])));
}

// ------------------------------------------------------------------ the engine and its HTTP surface
/** Catalog columns (name, void, regclass ...) that the adapter knows no type for are read as text. */
function readCatalogTypesAsText() {
  const Result = require(fromNpm('pg/lib/result.js'));
  const plain = Result.prototype.addFields;
  const text = 25;
  const textArray = 1009;
  const as = { 18: text, 19: text, 28: text, 705: text, 1186: text, 2205: text, 2206: text, 2278: text };
  Object.assign(as, { 1003: textArray, 1187: textArray, 2210: textArray });
  Result.prototype.addFields = function addFields(fields) {
    for (const field of fields) field.dataTypeID = as[field.dataTypeID] ?? field.dataTypeID;
    return plain.call(this, fields);
  };
}

function connect() {
  const { Pool } = require(fromNpm('pg'));
  const { PrismaPg } = require(fromNpm('@prisma/adapter-pg'));
  const { bindAdapter } = require(fromNpm('@prisma/driver-adapter-utils'));
  readCatalogTypesAsText();
  const url = new URL(process.env.DATABASE_URL);
  const size = Number(url.searchParams.get('connection_limit') ?? 5);
  url.search = ''; // the rest is for the native engine
  const pool = new Pool({ connectionString: url.toString(), max: size });
  pool.on('error', (error) => console.error('query engine:', error.message)); // the pool replaces the connection
  return bindAdapter(new PrismaPg(pool));
}

async function startEngine(adapter, datamodel) {
  const runtime = fromNpm('@prisma/client/runtime/query_engine_bg.postgresql');
  const glue = require(`${runtime}.js`);
  const module = new WebAssembly.Module(fs.readFileSync(`${runtime}.wasm`));
  const instance = new WebAssembly.Instance(module, { './query_engine_bg.js': glue });
  glue.__wbg_set_wasm(instance.exports);
  const settings = { env: process.env, logQueries: false, logLevel: 'error', configDir: '.', datasourceOverrides: {} };
  const withAdapters = datamodel.replace(/^(generator \w+ \{)/m, '$1\n  previewFeatures = ["driverAdapters"]');
  const protocol = { datamodel: withAdapters, engineProtocol: 'json', ignoreEnvVarErrors: true };
  const engine = new glue.QueryEngine({ ...settings, ...protocol }, () => {}, adapter);
  await engine.connect('{}');
  return engine;
}

async function main() {
  const datamodel = fs.readFileSync(process.env.PRISMA_DML_PATH, 'utf8');
  const models = new Models(datamodel);
  const adapter = connect();
  const engine = await startEngine(adapter, datamodel);

  const failed = (errors) => {
    for (const error of errors) {
      const known = error.user_facing_error;
      if (known?.error_code !== 'P2036') continue; // the message of an error on our side is kept by the adapter
      const cause = adapter.errorRegistry.consumeError(known.meta.id);
      known.message = error.error = String(cause?.error ?? known.message);
    }
    return { errors };
  };
  const one = async (text, transaction) => {
    const data = {};
    for (const field of new Document(text).operations()) {
      const reply = JSON.parse(await engine.query(JSON.stringify(models.query(field)), '{}', transaction));
      if (reply.errors) return failed(reply.errors);
      const found = unmarked(Object.values(reply.data)[0]);
      data[field.alias] = field.name === 'queryRaw' ? rawRows(found) : found;
    }
    return { data };
  };
  const together = async (queries, transaction) => {
    const fields = queries.map(({ query }) => new Document(query).operations()[0]);
    const batch = { batch: fields.map((field) => models.query(field)), transaction: {} };
    const reply = JSON.parse(await engine.query(JSON.stringify(batch), '{}', transaction));
    if (reply.errors) return failed(reply.errors);
    const results = reply.batchResult.map((result, i) =>
      result.errors ? failed(result.errors) : { data: { [fields[i].alias]: unmarked(Object.values(result.data)[0]) } });
    return { batchResult: results };
  };
  const answer = async (address, body, transaction) => {
    if (address === '/status') return { status: 'ok' };
    if (address.startsWith('/metrics')) return { counters: [], gauges: [], histograms: [] };
    if (address === '/transaction/start') return JSON.parse(await engine.startTransaction(body, '{}'));
    const [, id, verb] = /^\/transaction\/(.+)\/(commit|rollback)$/.exec(address) ?? [];
    if (verb) return JSON.parse((await engine[`${verb}Transaction`](id, '{}')) || '{}');
    const { query, batch } = JSON.parse(body);
    return batch ? together(batch, transaction) : one(query, transaction);
  };
  const server = http.createServer(async (request, response) => {
    let reply;
    try {
      const body = Buffer.concat(await request.toArray()).toString();
      reply = await answer(request.url, body, request.headers['x-transaction-id']);
    } catch (error) {
      const message = `query engine of the tests: ${error.message ?? error}`;
      reply = { errors: [{ error: message, user_facing_error: { is_panic: false, message } }] };
    }
    response.writeHead(200, { 'content-type': 'application/json' });
    response.end(JSON.stringify(reply, (_, value) => (typeof value === 'bigint' ? String(value) : value)));
  });
  server.keepAliveTimeout = 600_000; // the client keeps its connections for long
  server.listen(Number(process.argv[process.argv.indexOf('-p') + 1]), 'localhost');
  const parent = process.ppid;
  setInterval(() => process.ppid === parent || process.exit(0), 2000).unref(); // never outlives the proxy
}

process.title = 'query-engine'; // LiteLLM looks for left-over ones by this name
main().catch((error) => {
  console.error('query engine of the tests:', error);
  process.exit(1);
});
