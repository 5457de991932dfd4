// A page that is opened as a file gets no worker from the browser: this runs the search's in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      this.heard = (event) => {
        if (event.source === inner && this.onmessage) this.onmessage(event);
      };
      window.addEventListener("message", this.heard);
      this.ready = new Promise((resolve) => this.frame.addEventListener("load", resolve));
      inner.document.write(
        '<script>self.postMessage = (data) => parent.postMessage(data, "*")</script>' +
          `<script src="${url}"></script>`,
      );
      inner.document.close();
    }

    postMessage(message) {
      const data = structuredClone(message); // as a worker's: the sender goes on changing its own
      this.ready.then(() => this.frame.contentWindow?.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      window.removeEventListener("message", this.heard);
      this.frame.remove();
    }
  };
}
