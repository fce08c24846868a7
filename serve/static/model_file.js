// Reading a .safetensors file: an 8-byte length, a JSON header, then the raw values.

const READERS = {
  F64: [8, (view, at) => view.getFloat64(at, true)],
  F32: [4, (view, at) => view.getFloat32(at, true)],
  F16: [2, (view, at) => half(view.getUint16(at, true))],
  BF16: [2, (view, at) => brainFloat(view.getUint16(at, true))],
};

export class ModelFile {
  // `buffer` may end anywhere after the header, as long as no values behind it are asked for.
  constructor(buffer) {
    this.view = new DataView(buffer);
    this.start = ModelFile.headerEnd(buffer);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, this.start - 8)));
    const { __metadata__: metadata = {}, ...tensors } = header;
    this.metadata = metadata;
    this.tensors = tensors;
  }

  // Where the header ends and the values begin.
  static headerEnd(buffer) {
    return 8 + Number(new DataView(buffer).getBigUint64(0, true));
  }

  // The values at `places` of a flattened floating-point tensor.
  valuesAt(name, places) {
    const { dtype, data_offsets: [first] } = this.tensors[name];
    const [size, read] = READERS[dtype];
    return places.map((place) => read(this.view, this.start + first + size * place));
  }
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -24 * fraction;
}

function brainFloat(bits) {
  const view = new DataView(new ArrayBuffer(4));
  view.setUint16(0, bits);
  return view.getFloat32(0);
}
