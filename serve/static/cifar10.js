// A network for CIFAR-10's classes, run in the browser on sample images: `Cifar10Net` of rpg/tasks/cifar10_net.py.

export const CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
const SIZE = 32;
const MEAN = [0.4914, 0.4822, 0.4465];
const DEVIATION = [0.247, 0.2435, 0.2616];
const EPSILON = 1e-5;
// [number, channels, side of the kernel, stride, whether 2 × 2 places are pooled]; all are padded by one place.
const LAYERS = [[1, 32, 4, 2, true], [2, 48, 3, 1, false], [3, 48, 3, 1, true], [4, 64, 3, 1, false]];

// Whether a file of weights is such a network's.
export function isCifar10(tensors) {
  const expected = { "head.weight": [1, 64], "head.bias": [1] };
  let inputs = 3;
  for (const [number, channels, side] of LAYERS) {
    expected[`conv${number}.weight`] = [channels, inputs, side, side];
    for (const name of ["weight", "bias", "running_mean", "running_var"]) expected[`norm${number}.${name}`] = [channels];
    expected[`norm${number}.num_batches_tracked`] = [];
    inputs = channels;
  }
  const names = Object.keys(tensors);
  return names.length === Object.keys(expected).length
    && names.every((name) => JSON.stringify(tensors[name].shape) === JSON.stringify(expected[name]));
}

export class Cifar10Net {
  constructor(file) {
    const values = (name) => {
      const count = file.tensors[name].shape.reduce((product, size) => product * size, 1);
      return Float64Array.from(file.valuesAt(name, Array.from({ length: count }, (_, i) => i)));
    };
    this.layers = LAYERS.map(([number, channels, side, stride, isPooled]) => {
      const [weight, shift, mean, variance] = ["weight", "bias", "running_mean", "running_var"].map((name) => values(`norm${number}.${name}`));
      const scale = weight.map((value, i) => value / Math.sqrt(variance[i] + EPSILON));
      return { kernel: values(`conv${number}.weight`), scale, shift: shift.map((value, i) => value - mean[i] * scale[i]), channels, side, stride, isPooled };
    });
    this.weight = values("head.weight");
    this.bias = values("head.bias")[0];
  }

  // The probability of yes for an image of 32 × 32 pixels, each red, green, blue and opacity.
  answer(pixels) {
    const places = SIZE * SIZE;
    let image = { size: SIZE, channels: 3, values: new Float64Array(3 * places) };
    for (let place = 0; place < places; place++)
      for (let c = 0; c < 3; c++) image.values[c * places + place] = (pixels[4 * place + c] / 255 - MEAN[c]) / DEVIATION[c];
    for (const layer of this.layers) {
      image = convolved(image, layer);
      if (layer.isPooled) image = pooled(image);
    }
    const count = image.size * image.size;
    let logit = this.bias;
    for (let c = 0; c < image.channels; c++) {
      let sum = 0;
      for (let place = 0; place < count; place++) sum += image.values[c * count + place];
      logit += (this.weight[c] * sum) / count;
    }
    return 1 / (1 + Math.exp(-logit));
  }
}

// Convolution, BatchNorm with the statistics of training, and ReLU.
function convolved({ size, channels, values }, { kernel, scale, shift, channels: outputs, side, stride }) {
  const end = Math.floor((size + 2 - side) / stride) + 1;
  const result = new Float64Array(outputs * end * end);
  for (let out = 0; out < outputs; out++)
    for (let row = 0; row < end; row++)
      for (let column = 0; column < end; column++) {
        let sum = 0;
        for (let c = 0; c < channels; c++)
          for (let i = 0; i < side; i++) {
            const y = row * stride + i - 1;
            if (y < 0 || y >= size) continue;
            for (let j = 0; j < side; j++) {
              const x = column * stride + j - 1;
              if (x >= 0 && x < size)
                sum += values[(c * size + y) * size + x] * kernel[((out * channels + c) * side + i) * side + j];
            }
          }
        result[(out * end + row) * end + column] = Math.max(0, sum * scale[out] + shift[out]);
      }
  return { size: end, channels: outputs, values: result };
}

function pooled({ size, channels, values }) {
  const half = size / 2;
  const result = new Float64Array(channels * half * half);
  for (let c = 0; c < channels; c++)
    for (let row = 0; row < half; row++)
      for (let column = 0; column < half; column++) {
        const at = (c * size + 2 * row) * size + 2 * column;
        result[(c * half + row) * half + column] = Math.max(values[at], values[at + 1], values[at + size], values[at + size + 1]);
      }
  return { size: half, channels, values: result };
}

// The sample images by class: a sheet with one class a row.
export async function samples(blob) {
  const sheet = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const found = [];
  for (let row = 0; row < sheet.height / SIZE; row++)
    for (let column = 0; column < sheet.width / SIZE; column++) {
      const canvas = document.createElement("canvas");
      canvas.width = canvas.height = SIZE;
      const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
      context.drawImage(sheet, -SIZE * column, -SIZE * row);
      found.push({ canvas, kind: row, pixels: context.getImageData(0, 0, SIZE, SIZE).data });
    }
  return found;
}
