"use strict";
// The 3-D view of a case: NiiVue and the case's volumes are scripts beside this page, loaded when first asked for.
window.FLARE_VOLUMES = {};
window.FLARE_VIEW = (() => {
  const loading = new Map();
  let viewer = null;
  let wanted = 0;

  function script(address) {
    if (!loading.has(address)) {
      loading.set(address, new Promise((resolve, reject) => {
        const made = document.createElement("script");
        made.src = address;
        made.onload = resolve;
        made.onerror = () => {
          loading.delete(address);
          reject(new Error(`${address} is missing: copy the whole folder of the report`));
        };
        document.head.append(made);
      }));
    }
    return loading.get(address);
  }

  async function viewerOn(canvas, onPlace) {
    if (viewer) return viewer;
    if (!document.createElement("canvas").getContext("webgl2")) {
      throw new Error("The 3-D view needs WebGL 2, which this browser does not show. These slices show the same labels.");
    }
    await script("niivue/niivue.umd.js");
    const made = new niivue.Niivue({
      logLevel: "error", backColor: [0, 0, 0, 1], crosshairColor: [1, 1, 1, 0.6], crosshairWidth: 0.5, isColorbar: false,
      show3Dcrosshair: true, isRadiologicalConvention: true, sagittalNoseLeft: true, dragAndDropEnabled: false,
      isResizeCanvas: false, multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS,
    });
    made.onLocationChange = onPlace;
    await made.attachToCanvas(canvas);
    made.setSliceType(made.sliceTypeMultiplanar);
    viewer = made;
    return viewer;
  }

  function bytes(base64) {
    return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer;
  }

  function colours(organs) { // NiiVue's table of label colours; 0 is background and clear
    const channel = (organ, place) => parseInt(organ.colour.slice(place, place + 2), 16);
    return {
      I: [0, ...organs.map((organ) => organ.id)], R: [0, ...organs.map((organ) => channel(organ, 1))],
      G: [0, ...organs.map((organ) => channel(organ, 3))], B: [0, ...organs.map((organ) => channel(organ, 5))],
      A: [0, ...organs.map(() => 255)], labels: ["", ...organs.map((organ) => organ.name)],
    };
  }

  // Show a case of a round; returns whether it can be shown. `message` is an element that says why not, `place` one for
  // the organ under the cross.
  async function show(canvas, round, name, organs, message, place) {
    const mine = ++wanted;
    message.textContent = "Loading …";
    place.textContent = "";
    try {
      const on = await viewerOn(canvas, (at) => {
        const organ = at.values.length > 1 && organs.find(({ id }) => id === Math.round(at.values[1].value));
        place.textContent = organ ? organ.name.replaceAll("_", " ") : "no organ";
      });
      await script(`volumes/r${round}/${encodeURIComponent(name)}.js`);
      const { image, label, centre } = window.FLARE_VOLUMES[`r${round}/${name}`];
      const scan = await niivue.NVImage.new(bytes(image), "scan.nii.gz", "gray", 1);
      const labels = await niivue.NVImage.new(bytes(label), "label.nii.gz", "gray", 0.55);
      labels.setColormapLabel(colours(organs));
      if (mine !== wanted) return true; // the reader is at another case by now
      while (on.volumes.length) on.removeVolumeByIndex(on.volumes.length - 1);
      on.addVolume(scan);
      on.addVolume(labels);
      on.scene.crosshairPos = centre;
      on.updateGLVolume();
      on.createOnLocationChange();
      message.textContent = "";
      return true;
    } catch (error) {
      if (mine !== wanted) return true;
      message.textContent = error.message;
      return false;
    }
  }

  return { show };
})();
